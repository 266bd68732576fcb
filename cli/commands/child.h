#pragma once

#include <cstdio>
#include <string>
#include <vector>

namespace microbatch::cli {

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
