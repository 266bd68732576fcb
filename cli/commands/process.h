#pragma once

#include <cstdio>
#include <string>
#include <vector>

namespace microbatch::cli {

/// From now on the first SIGINT, SIGTERM or SIGHUP is only remembered; a second one, of whatever kind, ends the process
/// at once, as usual, unless it comes within a fifth of a second: some senders send one to a process and to its group.
/// One that was ignored when the process began (nohup) stays ignored.
void watch_interrupts();

/// True once a signal has come. Threads: any.
bool interrupted();

inline constexpr int interrupted_exit_code = 130;

/// Thrown where an interrupted command has nothing to keep.
struct Interrupted {};

/// What came of a command run in a process of its own.
struct ChildResult {
    int exit_code = 0;   ///< 128 and the signal's number where one ended it
    std::string output;  ///< of its stdout
    std::string error;   ///< what it said of its failure; empty if nothing
};

/// Runs this very command with other words and waits for it; what it says on stderr goes to `out` as it comes, but for
/// its error. The child ends with this process, however that ends.
/// Errors: Interrupted if a signal came: it was passed on, and the child has ended within seconds. ErrorKind::usage if
///         it cannot be started.
ChildResult run_child(const std::vector<std::string>& words, std::FILE* out);

}  // namespace microbatch::cli
