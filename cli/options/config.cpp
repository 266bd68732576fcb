#include "cli/options/config.h"

#include <fmt/format.h>

#include <toml++/toml.h>
#include <algorithm>
#include <nlohmann/json.hpp>
#include <string_view>

#include "cli/options/refuse.h"
#include "microbatch/io/input_file.h"

namespace microbatch::cli {
namespace {

constexpr std::uint64_t most_bytes = std::uint64_t{1} << 20U;

std::string as_text(const toml::node& node, const std::string& key) {
    if (const auto text = node.value_exact<std::string>()) return *text;
    if (const auto whole = node.value_exact<std::int64_t>()) return fmt::format("{}", *whole);
    if (const auto real = node.value_exact<double>()) return fmt::format("{}", *real);
    if (const auto flag = node.value_exact<bool>()) return *flag ? "true" : "false";
    refuse("the key {} must be a string, a number or a boolean", key);
}

// A number has no quotes, unless it exceeds TOML's integers.
std::string as_toml(const Option& option, const std::string& text) {
    const bool is_whole = text.find_first_not_of("0123456789") == std::string::npos;
    const std::string_view most = "9223372036854775807";
    const bool beyond = is_whole && (text.size() > most.size() || (text.size() == most.size() && text > most));
    if (!option.is_text() && !beyond) return text;
    // A JSON string is also a valid TOML string.
    return nlohmann::json(text).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

void apply_key(Arguments& arguments, const std::string& key, const toml::node& node) {
    const Option* option = find_option(key, arguments.command);
    if (key == "config" || (option == nullptr && find_option(key) == nullptr)) {
        const std::string near = did_you_mean(key, names_of(arguments.command));
        refuse("the key '{}' does not exist{}", key, near.empty() ? "; --help lists the valid keys" : near);
    }
    if (option == nullptr || arguments.has(key)) return;
    if (option->is_switch() && !node.is_boolean()) refuse("the key {} must be true or false", key);
    if (option->is_text() && !node.is_string()) refuse("the key {} must be a string", key);
    arguments.set(*option, as_text(node, key));
}

toml::table parse(const std::string& text, const std::string& source, ErrorKind kind) {
    try {
        return toml::parse(text, source);
    } catch (const toml::parse_error& error) {
        throw Error(kind, fmt::format("{} line {}: {}", source, error.source().begin.line, error.description()));
    }
}

bool has_length(const Arguments& arguments) {
    return std::any_of(options().begin(), options().end(), [&](const Option& option) {
        return option.group == length_group && arguments.has(option.name);
    });
}

}  // namespace

std::string config_text(const Settings& settings) {
    std::string result;
    for (const Option& option : options()) {
        const std::string text = text_of(option, settings);
        if (option.traits.at_resume == AtResume::not_recorded || text.empty() || !applies(option, settings)) continue;
        result += fmt::format("{} = {}\n", option.name, as_toml(option, text));
    }
    return result;
}

void apply_config_file(Arguments& arguments) {
    const std::string& file = arguments.settings.config;
    if (file.empty()) return;
    const std::string text = [&file] {
        try {
            return InputFile(file).read_all(most_bytes);
        } catch (const Error& error) {
            refuse("--config: {} is missing or cannot be read: {}", file, error.what());
        }
    }();
    apply_config(arguments, text, file);
}

void apply_config(Arguments& arguments, const std::string& text, const std::string& source,
                  const std::set<std::string>& without) {
    // A length on the command line overrides a length in another unit from the file.
    const bool length_is_given = has_length(arguments);
    for (const auto& [key, node] : parse(text, source, ErrorKind::usage)) {
        const std::string name(key.str());
        const Option* option = find_option(name);
        if (without.contains(name)) continue;
        if (option != nullptr && option->group == length_group && length_is_given) continue;
        try {
            apply_key(arguments, name, node);
        } catch (const Error& error) {
            refuse("{} line {}: {}", source, node.source().begin.line, error.what());
        }
    }
}

Values config_values(const std::string& text, const std::string& source) {
    Values values;
    for (const auto& [key, node] : parse(text, source, ErrorKind::bad_data)) {
        try {
            values.emplace(key.str(), as_text(node, std::string(key.str())));
        } catch (const Error& error) {
            throw Error(ErrorKind::bad_data, fmt::format("{}: {}", source, error.what()));
        }
    }
    return values;
}

Values read_config(const std::filesystem::path& folder) {
    const std::filesystem::path file = folder / "config.toml";
    if (!std::filesystem::exists(file)) return {};
    return config_values(InputFile(file).read_all(most_bytes), file.string());
}

}  // namespace microbatch::cli
