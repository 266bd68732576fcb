#pragma once

#include <stdexcept>
#include <string>

#include "microbatch/core/str_cat.h"

namespace microbatch {

/// The kind of an error, by what the caller can do about it. The values are the exit codes of the command.
enum class ErrorKind {
    usage = 2,         ///< a setting or an argument is wrong: change it and call again
    does_not_fit = 3,  ///< the memory budget is too small for the smallest micro-batch
    stopped = 4,       ///< the run was stopped because it diverged or ended worse than it began
    bad_data = 5,      ///< a file is missing, truncated or not what it says it is
    not_written = 6,   ///< a file could not be written: disk full, no permission
    lost_rank = 7,     ///< another process of the run has ended or cannot be reached
};

/// The only exception type of this library. The text says what is wrong, where, and what to do.
/// torch's own exceptions (c10::Error and its subclasses) pass through unchanged.
class Error : public std::runtime_error {
public:
    /// The message is its parts one after the other: see str_cat().
    template <class... Parts>
    explicit Error(ErrorKind kind, const Parts&... parts) : std::runtime_error(str_cat(parts...)), kind_(kind) {}

    ErrorKind kind() const noexcept { return kind_; }
    int exit_code() const noexcept { return static_cast<int>(kind_); }

private:
    ErrorKind kind_;
};

/// Throws ErrorKind::usage with this message unless the condition holds. The parts are joined only then.
template <class... Parts>
void require_that(bool condition, const Parts&... parts) {
    if (!condition) throw Error(ErrorKind::usage, parts...);
}

}  // namespace microbatch
