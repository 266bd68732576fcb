#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <algorithm>
#include <csignal>
#include <new>

#include "cli/commands/commands.h"
#include "cli/commands/interrupt.h"
#include "cli/commands/job.h"
#include "cli/options/flags.h"
#include "cli/options/nearest.h"
#include "cli/options/settings.h"
#include "microbatch/core/error.h"

namespace {

using namespace microbatch;

constexpr int internal_error = 1;

std::vector<std::string> flags_of(const CLI::App& command) {
    std::vector<std::string> flags;
    for (const CLI::Option* option : command.get_options()) {
        for (const std::string& name : option->get_lnames()) flags.push_back("--" + name);
    }
    return flags;
}

std::vector<std::string> names_of_commands(const CLI::App& application) {
    std::vector<std::string> names;
    for (const CLI::App* command : application.get_subcommands([](const CLI::App*) { return true; })) {
        names.push_back(command->get_name());
    }
    return names;
}

std::string did_you_mean(const std::string& given, const std::vector<std::string>& names) {
    const std::string suggestion = cli::nearest(given, names);
    return suggestion.empty() ? std::string() : fmt::format(" (did you mean {}?)", suggestion);
}

// The first command that has this flag; empty if none has.
std::string command_with(const CLI::App& application, const std::string& flag) {
    for (const CLI::App* command : application.get_subcommands([](const CLI::App*) { return true; })) {
        if (command->get_option_no_throw(flag) != nullptr) return command->get_name();
    }
    return {};
}

// What CLI11 says, or better where a flag or a command was mistyped.
std::string explain(const CLI::App& application, const CLI::ParseError& error, const std::vector<std::string>& words) {
    const auto called = application.get_subcommands();
    if (called.empty()) {
        if (words.empty()) return "name a command: train, compare, advise, plan, report or doctor";
        const std::string& word = words.front();
        if (word.starts_with("-")) {
            return fmt::format("{} is no flag before a command{}", word, did_you_mean(word, flags_of(application)));
        }
        return fmt::format("there is no command '{}'{}", word, did_you_mean(word, names_of_commands(application)));
    }
    if (dynamic_cast<const CLI::ExtrasError*>(&error) == nullptr) return cli::reworded(error);
    const std::vector<std::string> flags = flags_of(*called.front());
    for (const std::string& word : words) {
        const std::string flag = word.substr(0, word.find('='));
        if (!flag.starts_with("-") || std::find(flags.begin(), flags.end(), flag) != flags.end()) continue;
        const std::string owner = command_with(application, flag);
        return fmt::format("{} has no flag {}{}", called.front()->get_name(), flag,
                           owner.empty() ? did_you_mean(flag, flags) : fmt::format("; {} has", owner));
    }
    return error.what();
}

int fail(int code, const std::string& message) {
    std::fflush(stdout);
    fmt::print(stderr, "microbatch: {}\n", message);
    return code;
}

// A full disk behind stdout is an error, too.
int flushed(int code) {
    const bool written = std::fflush(stdout) == 0 && std::ferror(stdout) == 0;
    return written ? code : fail(internal_error, "the output could not be written");
}

int run(const cli::Action& action) {
    try {
        return flushed(action());
    } catch (const cli::Interrupted&) {
        return cli::interrupted_exit_code;
    } catch (const Error& error) {
        return fail(error.exit_code(), error.what());
    } catch (const c10::OutOfMemoryError& error) {
        return fail(static_cast<int>(ErrorKind::does_not_fit),
                    fmt::format("out of memory: {}: raise --memory, or take a smaller --micro-batch (or auto)",
                                error.what_without_backtrace()));
    } catch (const std::bad_alloc&) {
        return fail(static_cast<int>(ErrorKind::does_not_fit), "out of memory: the machine has no more to give");
    } catch (const c10::Error& error) {
        // A model that does not take the data, most of all.
        return fail(static_cast<int>(ErrorKind::usage), fmt::format("torch: {}", error.what_without_backtrace()));
    } catch (const std::filesystem::filesystem_error& error) {
        return fail(static_cast<int>(ErrorKind::usage),
                    fmt::format("{}: {}", error.path1().string(), error.code().message()));
    } catch (const std::exception& error) {
        return fail(internal_error, error.what());
    }
}

}  // namespace

int main(int count, char** arguments) {
    CLI::App application(
        "Microbatch: train with the batch size you want in the memory you have.\n"
        "You state the batch and a memory budget; it measures, cuts the batch into micro-batches that fit, and makes\n"
        "exactly the update of the whole batch.\n\n"
        "  microbatch train --data FOLDER --batch 64 --memory 100MiB --steps 200\n",
        "microbatch");
    application.set_version_flag("--version", "microbatch " MICROBATCH_VERSION);
    application.require_subcommand(1);
    application.footer(
        "Exit codes: 0 done, 2 bad usage or configuration, 3 does not fit the budget, 4 stopped by the guard,\n"
        "5 bad data or checkpoint, 130 interrupted.\n"
        "`microbatch COMMAND --help` tells more of each.");
    std::signal(SIGXFSZ, SIG_IGN);                  // a file that may not grow is an error to be told, like a full disk
    std::setvbuf(stdout, nullptr, _IOLBF, BUFSIZ);  // in a pipe, too, a line is to be read when it is written
    cli::Action action;
    cli::add_train(application, action);
    cli::add_compare(application, action);
    cli::add_advise(application, action);
    cli::add_plan(application, action);
    cli::add_report(application, action);
    cli::add_doctor(application, action);
    try {
        application.parse(count, arguments);
    } catch (const CLI::Success& wanted) {
        return application.exit(wanted);
    } catch (const CLI::ParseError& error) {
        const std::vector<std::string> words(arguments + 1, arguments + count);
        return fail(static_cast<int>(ErrorKind::usage),
                    explain(application, error, words) + "\nRun with --help for more information.");
    } catch (const Error& error) {
        return fail(error.exit_code(), error.what());
    }
    return run(action);
}
