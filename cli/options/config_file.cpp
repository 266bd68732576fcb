#include "cli/options/config_file.h"

#include <fmt/format.h>

#include <toml++/toml.h>
#include <algorithm>
#include <vector>

#include "cli/options/flags.h"
#include "cli/options/nearest.h"
#include "cli/options/refuse.h"
#include "microbatch/core/error.h"
#include "microbatch/io/input_file.h"

namespace microbatch::cli {
namespace {

const std::vector<std::string> length_flags = {"steps", "samples", "tokens"};

std::string as_text(const toml::node& node, const std::string& key) {
    if (const auto text = node.value_exact<std::string>()) return *text;
    if (const auto whole = node.value_exact<std::int64_t>()) return fmt::format("{}", *whole);
    if (const auto real = node.value_exact<double>()) return fmt::format("{}", *real);
    if (const auto flag = node.value_exact<bool>()) return *flag ? "true" : "false";
    refuse(fmt::format("the key {} must be a string, a number or a boolean", key));
}

std::vector<std::string> flag_names(CLI::App& command) {
    std::vector<std::string> names;
    for (const CLI::Option* option : command.get_options()) {
        for (const std::string& name : option->get_lnames()) {
            if (name != "help" && name != "config") names.push_back(name);
        }
    }
    return names;
}

// One file serves train, plan and compare: what only another of them knows is left to it.
bool is_flag_of_another(CLI::App& command, const std::string& key) {
    for (CLI::App* other : command.get_parent()->get_subcommands([](CLI::App*) { return true; })) {
        const std::vector<std::string> names = flag_names(*other);
        if (std::find(names.begin(), names.end(), key) != names.end()) return true;
    }
    return false;
}

void apply_key(CLI::App& command, const std::string& file, const std::string& key, const toml::node& node) {
    const std::vector<std::string> names = flag_names(command);
    if (std::find(names.begin(), names.end(), key) == names.end()) {
        if (is_flag_of_another(command, key)) return;
        const std::string suggestion = nearest(key, names);
        refuse(fmt::format("{} line {}: the key '{}' does not exist{}", file, node.source().begin.line, key,
                           suggestion.empty() ? "; run with --help for those that do"
                                              : fmt::format("; did you mean '{}'?", suggestion)));
    }
    CLI::Option* option = command.get_option("--" + key);
    if (option->count() > 0) return;
    const std::string where = fmt::format("{} line {}: the key {}", file, node.source().begin.line, key);
    const std::string type = option->get_type_name();
    const bool is_switch = option->get_expected_min() == 0;
    const bool is_text =
        type == "PATH" || type == "NAME" || type == "DIR" || type == "INTERVAL" || type == "SIZE" || type == "TEXT";
    if (is_switch && !node.is_boolean()) refuse(where + " must be true or false");
    if (is_text && !node.is_string()) refuse(where + " must be a string");
    try {
        option->add_result(as_text(node, key));
        option->run_callback();
    } catch (const CLI::Error& error) {
        refuse(fmt::format("{} line {}: {}", file, node.source().begin.line, reworded(error)));
    } catch (const Error& error) {
        refuse(fmt::format("{} line {}: {}", file, node.source().begin.line, error.what()));
    }
}

toml::table parse(const std::string& text, const std::string& source, ErrorKind kind) {
    try {
        return toml::parse(text, source);
    } catch (const toml::parse_error& error) {
        throw Error(kind, fmt::format("{} line {}: {}", source, error.source().begin.line, error.description()));
    }
}

}  // namespace

void apply_config_file(CLI::App& command, const std::string& file) {
    constexpr std::uint64_t most_bytes = std::uint64_t{1} << 20U;
    if (file.empty()) return;
    const std::string text = [&file] {
        try {
            return InputFile(file).read_all(most_bytes);
        } catch (const Error& error) {
            refuse(fmt::format("--config: {} is missing or cannot be read: {}", file, error.what()));
        }
    }();
    apply_config(command, text, file);
}

void apply_config(CLI::App& command, const std::string& text, const std::string& source,
                  const std::vector<std::string>& without) {
    const toml::table table = parse(text, source, ErrorKind::usage);
    const bool has_length = std::any_of(length_flags.begin(), length_flags.end(), [&command](const std::string& name) {
        const CLI::Option* option = command.get_option_no_throw("--" + name);
        return option != nullptr && option->count() > 0;
    });
    for (const auto& [key, node] : table) {
        const std::string name(key.str());
        if (std::find(without.begin(), without.end(), name) != without.end()) continue;
        // A length on the command line wins over a length of another unit in the file.
        const bool is_length = std::find(length_flags.begin(), length_flags.end(), name) != length_flags.end();
        if (!(is_length && has_length)) apply_key(command, source, name, node);
    }
}

std::map<std::string, std::string> config_values(const std::string& text, const std::string& source) {
    std::map<std::string, std::string> values;
    for (const auto& [key, node] : parse(text, source, ErrorKind::bad_data)) {
        try {
            values.emplace(key.str(), as_text(node, std::string(key.str())));
        } catch (const Error& error) {
            throw Error(ErrorKind::bad_data, fmt::format("{}: {}", source, error.what()));
        }
    }
    return values;
}

}  // namespace microbatch::cli
