#pragma once

#include <cstdio>
#include <string>
#include <vector>

namespace microbatch::cli {

/// From now on, the first SIGINT, SIGTERM or SIGHUP is only recorded. A second one of any kind ends the process
/// immediately, unless it arrives within a fifth of a second: some senders signal a process and also its group. A
/// signal that was ignored when the process started (nohup) stays ignored.
void watch_interrupts();

/// True once a signal has arrived. Threads: any.
bool interrupted();

inline constexpr int interrupted_exit_code = 130;

/// Thrown if a command is interrupted and has nothing to save.
struct Interrupted {};

/// The result of a command that ran in its own process.
struct ChildResult {
    int exit_code = 0;   ///< 128 plus the signal number if a signal ended it
    std::string output;  ///< its stdout
    std::string error;   ///< its error message, or an empty string
};

/// Runs this program with other arguments and waits for it. Its stderr, except for its error message, is passed to
/// `out` as it arrives. The child ends with this process, however that ends.
/// Errors: Interrupted if a signal arrived: it is passed on, and the child ends within seconds. ErrorKind::usage if the
///         child cannot be started.
ChildResult run_child(const std::vector<std::string>& words, std::FILE* out);

}  // namespace microbatch::cli
