#include "cli/options/options.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <charconv>
#include <numeric>
#include <type_traits>

#include "cli/options/refuse.h"

namespace microbatch::cli {
namespace {

template <class T>
T read_digits(const std::string& text) {
    T value{};
    const auto [end, failure] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (failure == std::errc() && end == text.data() + text.size()) return value;
    if constexpr (std::is_integral_v<T>) return static_cast<T>(parse_count(text));  // "10k"
    refuse("\"{}\" is not a number", text);
}

template <class T>
T parse(const std::string& text) {
    if constexpr (std::is_same_v<T, std::string>) {
        return text;
    } else if constexpr (std::is_same_v<T, bool>) {
        return text == "true";
    } else if constexpr (std::is_same_v<T, std::int64_t>) {
        return parse_count(text);
    } else if constexpr (std::is_arithmetic_v<T>) {
        return read_digits<T>(text);
    } else {
        return parse<typename T::value_type>(text);  // optional
    }
}

// The Levenshtein distance, computed row by row.
std::size_t edit_distance(std::string_view a, std::string_view b) {
    std::vector<std::size_t> row(b.size() + 1);
    std::iota(row.begin(), row.end(), 0);
    for (std::size_t i = 0; i < a.size(); ++i) {
        std::size_t diagonal = row[0]++;
        for (std::size_t j = 0; j < b.size(); ++j) {
            const std::size_t replaced = diagonal + (a[i] != b[j]);
            diagonal = row[j + 1];
            row[j + 1] = std::min({row[j] + 1, row[j + 1] + 1, replaced});
        }
    }
    return row.back();
}

// "1k" and "1000" are the same.
std::string canonical(const Option& option, const std::string& text) {
    try {
        Settings settings;
        read(option, text, settings);
        return text_of(option, settings);
    } catch (const Error&) {
        return text;
    }
}

const std::string& recorded(const Option* option, const Values& values, const std::string& name) {
    const bool has_default = option != nullptr && !option->traits.unrecorded.empty();
    return has_default && !values.contains(name) ? option->traits.unrecorded : value_in(values, name);
}

}  // namespace

const Option* find_option(std::string_view name, unsigned commands) {
    for (const Option& option : options()) {
        if (option.name == name && (option.traits.commands & commands) != 0) return &option;
    }
    return nullptr;
}

std::string text_of(const Option& option, const Settings& settings) {
    const auto text = [&](auto member) {
        const auto& value = settings.*member;
        if constexpr (requires { value.has_value(); })
            return value ? fmt::format("{}", *value) : std::string();
        else
            return fmt::format("{}", value);
    };
    return std::visit(text, option.member);
}

bool applies(const Option& option, const Settings& settings) {
    const OnlyWith& only = option.traits.only_with;
    if (only.values.empty()) return true;
    const std::string other = text_of(*find_option(only.option), settings);
    return other.empty() || is_in(only.values, other);
}

void require_options_apply(const Settings& settings) {
    for (const Option& option : options()) {
        if (applies(option, settings) || text_of(option, settings) == text_of(option, Settings())) continue;
        const OnlyWith& only = option.traits.only_with;
        refuse("--{} contradicts --{} {}: it is an option of {}", option.name, only.option,
               text_of(*find_option(only.option), settings), one_of(only.values));
    }
}

void read(const Option& option, const std::string& text, Settings& settings) {
    const std::string flag = "--" + option.name;
    const std::vector<std::string>& choices = option.traits.choices;
    const Range& range = option.traits.range;
    if (text.empty()) refuse("{} is empty: give it a value, or leave it out", flag);
    if (option.is_text() && !choices.empty() && !is_in(choices, text)) {
        refuse("{} {}: must be {}", flag, text, one_of(choices));
    }
    const auto set = [&]<class Value>(Value Settings::*member) {
        const bool is_none = !option.is_text() && is_in(choices, text);
        settings.*member = is_none ? Value() : read_flag(flag.c_str(), [&] { return parse<Value>(text); });
    };
    std::visit(set, option.member);
    if (range.holds == nullptr || is_in(choices, text)) return;
    if (!range.holds(read_digits<double>(text_of(option, settings)))) {
        refuse("{} {}: must be {}", flag, text, range.text);
    }
}

std::string did_you_mean(std::string_view given, const std::vector<std::string>& names) {
    std::string best;
    // A short word is similar to every word.
    std::size_t best_distance = std::min(given.size(), std::max<std::size_t>(3, given.size() / 3 + 1));
    for (const std::string& name : names) {
        const std::size_t distance = edit_distance(given, name);
        if (distance >= best_distance) continue;
        best = name;
        best_distance = distance;
    }
    return best.empty() ? best : fmt::format("; did you mean '{}'?", best);
}

std::vector<std::string> names_of(unsigned commands) {
    std::vector<std::string> names;
    for (const Option& option : options()) {
        if ((option.traits.commands & commands) != 0) names.push_back(option.name);
    }
    return names;
}

bool is_in(const std::vector<std::string>& words, const std::string& word) {
    return std::find(words.begin(), words.end(), word) != words.end();
}

std::string one_of(const std::vector<std::string>& words) {
    if (words.size() == 1) return words.front();
    return fmt::format("{} or {}", fmt::join(words.begin(), words.end() - 1, ", "), words.back());
}

Differences differences(const Values& was, const Values& is) {
    Values all = was;
    all.insert(is.begin(), is.end());
    Differences found;
    for (const auto& [name, ignored] : all) {
        const Option* option = find_option(name);
        const std::string &old = recorded(option, was, name), &now = recorded(option, is, name);
        const AtResume kind = option == nullptr ? AtResume::noted : *option->traits.at_resume;
        if (old == now || kind == AtResume::ignored || kind == AtResume::not_recorded) continue;
        auto& list = kind == AtResume::another_run   ? found.another_run
                     : kind == AtResume::another_cut ? found.another_cut
                                                     : found.noted;
        list.push_back(fmt::format("{} was {}, is {}", name, old, now));
    }
    return found;
}

Values overridden(const Values& was, const Values& given) {
    Values now = was;
    for (const auto& [name, text] : given) {
        const Option& option = *find_option(name);
        if (canonical(option, text) != canonical(option, value_in(was, name))) now[name] = text;
    }
    return now;
}

std::set<std::string> outdated(const Values& was, const Values& now) {
    const auto changed = [&](const char* name) { return value_in(was, name) != value_in(now, name); };
    std::set<std::string> names;
    for (const Option& option : options()) {
        const OnlyWith& only = option.traits.only_with;
        const bool reset = std::any_of(option.traits.reset_by.begin(), option.traits.reset_by.end(), changed);
        const bool applies = only.values.empty() || !changed(only.option) || is_in(only.values, now.at(only.option));
        if (reset || !applies) names.insert(option.name);
    }
    return names;
}

const std::string& value_in(const Values& values, const std::string& name) {
    static const std::string none = "not given";
    const auto found = values.find(name);
    return found == values.end() ? none : found->second;
}

}  // namespace microbatch::cli
