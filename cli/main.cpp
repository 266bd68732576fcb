#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <new>
#include <sstream>

#include "cli/commands/commands.h"
#include "cli/commands/job.h"
#include "cli/commands/process.h"
#include "cli/commands/ranks.h"
#include "cli/print/output.h"
#include "microbatch/core/error.h"

namespace {

using namespace microbatch;

int fail(ErrorKind kind, const std::string& message) {
    // Which rank was lost, each finds by itself.
    if (kind != ErrorKind::lost_rank) cli::leave_ranks(message);
    cli::print(stderr, "microbatch: {}\n", message);
    return static_cast<int>(kind);
}

int run(const cli::Action& action) {
    try {
        return action();
    } catch (const cli::Interrupted&) {
        cli::leave_ranks("it was interrupted");
        return cli::interrupted_exit_code;
    } catch (const Error& error) {
        return fail(error.kind(), error.what());
    } catch (const c10::OutOfMemoryError& error) {
        return fail(ErrorKind::does_not_fit,
                    fmt::format("out of memory: {}: raise --memory, or use a smaller --micro-batch (or auto)",
                                error.what_without_backtrace()));
    } catch (const std::bad_alloc&) {
        return fail(ErrorKind::does_not_fit, "out of memory: the machine has no free memory left");
    } catch (const c10::Error& error) {
        // Mostly a model that does not accept the data.
        return fail(ErrorKind::usage, fmt::format("torch: {}", error.what_without_backtrace()));
    } catch (const std::filesystem::filesystem_error& error) {
        return fail(ErrorKind::usage, fmt::format("{}: {}", error.path1().string(), error.code().message()));
    } catch (const std::exception& error) {
        return fail(ErrorKind::usage, fmt::format("unexpected error: {}", error.what()));
    }
}

int parse_and_run(CLI::App& application, int count, char** arguments) {
    cli::Action action;
    for (const cli::CommandSpec& command : {cli::train_command(), cli::compare_command(), cli::advise_command(),
                                            cli::plan_command(), cli::report_command(), cli::doctor_command()}) {
        cli::declare(application, command, action);
    }
    try {
        application.parse(count, arguments);
    } catch (const CLI::Success& wanted) {
        std::ostringstream text;
        application.exit(wanted, text, text);
        cli::write(stdout, text.str());
        return 0;
    } catch (const CLI::ParseError& error) {
        const std::vector<std::string> words(arguments + 1, arguments + count);
        return fail(ErrorKind::usage,
                    cli::explain(application, error, words) + "\nRun with --help for more information.");
    }
    return action();
}

/// Ends the process. Without the destructors of LibTorch's thousands of operators, which take a third of the time of a
/// short command; a sanitizer reports after them.
int leave(int code) {
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
    std::fflush(nullptr);
    std::_Exit(code);
#endif
    return code;
}

}  // namespace

int main(int count, char** arguments) {
    CLI::App application(
        "Microbatch: train with the batch size you want in the memory you have.\n"
        "State a batch size and a memory budget. Microbatch measures your job, splits the batch into micro-batches "
        "that\n"
        "fit, and accumulates their gradients into the update of the whole batch.\n\n"
        "  microbatch train --data FOLDER --batch 64 --memory 100MiB --steps 200\n",
        "microbatch");
    application.set_version_flag("--version", "microbatch " MICROBATCH_VERSION);
    application.require_subcommand(1);
    application.footer(
        "Exit codes:\n"
        "  0 done\n"
        "  2 bad usage or configuration, or an unexpected error\n"
        "  3 does not fit in the memory budget\n"
        "  4 stopped by the guard, or ended worse than it began\n"
        "  5 bad data or checkpoint\n"
        "  6 a file could not be written\n"
        "  7 another process of the run has ended\n"
        "  130 interrupted, checkpoint written\n"
        "A closed or full stdout or stderr does not change the exit code.\n"
        "`microbatch COMMAND --help` explains each command.");
    std::signal(SIGXFSZ, SIG_IGN);  // beyond the file size limit, a write fails as on a full disk
    cli::prepare_output();
    return leave(run([&] { return parse_and_run(application, count, arguments); }));
}
