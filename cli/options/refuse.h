#pragma once

#include <fmt/format.h>

#include <string>

#include "microbatch/core/error.h"

namespace microbatch::cli {

[[noreturn]] inline void refuse(const std::string& message) {
    throw Error(ErrorKind::usage, message);
}

/// Returns the result of `read`; an error gets the name of the flag as a prefix.
template <class Read>
auto read_flag(const char* flag, Read read) {
    try {
        return read();
    } catch (const Error& error) {
        throw Error(error.kind(), fmt::format("{}: {}", flag, error.what()));
    }
}

}  // namespace microbatch::cli
