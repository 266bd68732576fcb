#include "cli/options/command_line.h"

#include <fmt/format.h>

#include <memory>

#include "cli/options/config.h"

namespace microbatch::cli {
namespace {

constexpr std::size_t help_columns = 70;

bool all(const CLI::App* /*command*/) {
    return true;
}

// Lines of --help. No line begins with a flag, because it would look like that flag's own entry.
std::string wrapped(std::string text) {
    for (std::size_t begin = 0; text.size() - begin > help_columns;) {
        std::size_t space = text.rfind(' ', begin + help_columns);
        while (text.compare(space + 1, 2, "--") == 0) space = text.rfind(' ', space - 1);
        text[space] = '\n';
        begin = space + 1;
    }
    return text;
}

std::string help_of(const Option& option) {
    const std::string& words = option.traits.fallback;
    const std::string value = words.empty() && !option.is_switch() ? text_of(option, Settings()) : words;
    return wrapped(value.empty() ? option.help : fmt::format("{} (default: {})", option.help, value));
}

void declare_option(CLI::App& command, const Option& option, const CommandSpec& spec, Arguments& arguments) {
    const bool positional = spec.command == command::report;
    const std::string flag = (positional ? "" : "--") + option.name;
    CLI::Option* declared = nullptr;
    if (option.is_switch()) {
        declared = command.add_flag_function(
            flag, [&](std::int64_t times) { arguments.set(option, times > 0 ? "true" : "false"); }, help_of(option));
    } else {
        declared = command.add_option_function<std::string>(
            flag, [&](const std::string& text) { arguments.set(option, text); }, help_of(option));
        declared->type_name(option.value)->required(positional);
    }
    const bool is_length = option.group == length_group;
    declared->group(is_length ? fmt::format("How long (give one; default: {})", spec.length) : option.group);
}

std::string explain_no_command(const CLI::App& application, const std::vector<std::string>& words) {
    std::vector<std::string> commands;
    for (const CLI::App* one : application.get_subcommands(all)) commands.push_back(one->get_name());
    if (words.empty()) return fmt::format("name a command: {}", one_of(commands));
    const std::string& word = words.front();
    if (word.starts_with("-")) return "unknown global option " + word + did_you_mean(word, {"--help", "--version"});
    return fmt::format("unknown command '{}'{}", word, did_you_mean(word, commands));
}

}  // namespace

void declare(CLI::App& application, const CommandSpec& spec, Action& action) {
    CLI::App* command = application.add_subcommand(spec.name, spec.summary);
    auto arguments = std::make_shared<Arguments>(Arguments{.command = spec.command});
    for (const Option& option : options()) {
        if ((option.traits.commands & spec.command) != 0) declare_option(*command, option, spec, *arguments);
    }
    command->footer(spec.footer);
    command->callback([arguments, run = spec.run, &action] {
        action = [arguments, run] {
            arguments->flags = arguments->given;
            apply_config_file(*arguments);
            return run(*arguments);
        };
    });
}

std::string explain(const CLI::App& application, const CLI::ParseError& error, const std::vector<std::string>& words) {
    const auto called = application.get_subcommands();
    if (called.empty()) return explain_no_command(application, words);
    const std::string message = error.what();
    const std::size_t twice = message.find(": At Most 1 required but received");
    if (twice != std::string::npos) return message.substr(0, twice) + " is given twice";
    if (dynamic_cast<const CLI::ExtrasError*>(&error) == nullptr) return message;
    const CLI::App& command = *called.front();
    for (const std::string& word : words) {
        const std::string flag = word.substr(0, word.find('='));
        if (!flag.starts_with("-") || command.get_option_no_throw(flag) != nullptr) continue;
        std::vector<std::string> flags, owners;
        for (const CLI::Option* one : command.get_options()) flags.push_back(one->get_name());
        for (const CLI::App* other : application.get_subcommands(all)) {
            if (other->get_option_no_throw(flag) != nullptr) owners.push_back(other->get_name());
        }
        const std::string hint = owners.empty() ? did_you_mean(flag, flags) : "; it is an option of " + one_of(owners);
        return fmt::format("{} has no option {}{}", command.get_name(), flag, hint);
    }
    return message;
}

}  // namespace microbatch::cli
