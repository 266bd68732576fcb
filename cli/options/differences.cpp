#include "cli/options/differences.h"

#include <fmt/format.h>

#include <algorithm>

#include "microbatch/core/error.h"

namespace microbatch::cli {
namespace {

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

}  // namespace

Differences differences(const Values& was, const Values& is) {
    Values all = was;
    all.insert(is.begin(), is.end());
    Differences found;
    for (const auto& [name, ignored] : all) {
        const std::string &old = value_in(was, name), &now = value_in(is, name);
        const Option* option = find_option(name);
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
