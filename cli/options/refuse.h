#pragma once

#include <fmt/format.h>

#include <string>

#include "microbatch/core/error.h"

namespace microbatch::cli {

[[noreturn]] inline void refuse(const std::string& message) {
    throw Error(ErrorKind::usage, message);
}

template <class First, class... Rest>
[[noreturn]] void refuse(fmt::format_string<First, Rest...> format, First&& first, Rest&&... rest) {
    refuse(fmt::format(format, std::forward<First>(first), std::forward<Rest>(rest)...));
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
