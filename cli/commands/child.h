#pragma once

#include <cstdio>
#include <string>
#include <vector>

namespace microbatch::cli {

/// The result of a command that ran in its own process.
struct ChildResult {
    int exit_code = 0;   ///< 128 plus the signal number if a signal ended it
    std::string output;  ///< its stdout
    std::string error;   ///< its error message; empty if there is none
};

/// Runs this program with other arguments and waits for it. Its stderr, except for its error message, is passed to
/// `out` as it arrives. The child ends with this process, however that ends.
/// Errors: Interrupted if a signal arrived: it is passed on, and the child ends within seconds. ErrorKind::usage if the
///         child cannot be started.
ChildResult run_child(const std::vector<std::string>& words, std::FILE* out);

}  // namespace microbatch::cli
