#pragma once

#include <cstdio>
#include <string>
#include <vector>

namespace microbatch::cli {

/// What came of a command run in a process of its own.
struct ChildResult {
    int exit_code = 0;
    std::string output;  ///< of its stdout
    std::string errors;  ///< its last line on stderr
};

/// Runs this very command with other words and waits for it; what it says on stderr goes to `out` as it comes, but for
/// its last line where it fails.
/// Errors: Interrupted if a signal came: the child has had it too, and is waited for. ErrorKind::usage if it cannot be
///         started.
ChildResult run_child(const std::vector<std::string>& words, std::FILE* out);

}  // namespace microbatch::cli
