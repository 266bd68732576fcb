#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <optional>
#include <string_view>
#include <type_traits>

#include "microbatch/core/error.h"
#include "support/temp_folder.h"

/// What the targets share. A target is the function LLVMFuzzerTestOneInput of its own file, see tests/fuzz/run.
namespace microbatch::fuzz {

/// Ends the process, which is what the fuzzer takes for a finding.
inline void require(bool holds, std::string_view what) {
    if (holds) return;
    std::cerr << "this does not hold: " << what << '\n';
    std::abort();
}

/// What the call gives, or nothing where it refuses the input with an error of this kind. Whatever else it throws ends
/// the process.
template <class Call>
std::optional<std::invoke_result_t<Call>> accepted(ErrorKind kind, Call&& call) {
    try {
        return call();
    } catch (const Error& error) {
        require(error.kind() == kind, error.what());
        require(!std::string_view(error.what()).empty(), "an error says what is wrong");
        return std::nullopt;
    }
}

inline std::string_view characters(const std::uint8_t* data, std::size_t size) {
    return {reinterpret_cast<const char*>(data), size};
}

/// A folder of this process, below the one for temporary files.
inline const test::TempFolder& folder() {
    static const test::TempFolder folder;
    return folder;
}

}  // namespace microbatch::fuzz
