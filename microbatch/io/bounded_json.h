#pragma once

#include <cstddef>
#include <nlohmann/json_fwd.hpp>
#include <string_view>

namespace microbatch {

/// Parses untrusted JSON: a value takes many times the memory of its text, so the number of values and their nesting
/// depth are bounded.
///
/// Memory: the text, and 64 bytes per value.
/// Errors: std::invalid_argument that says why, also if the text is not valid JSON.
nlohmann::json parse_bounded(std::string_view text, std::size_t most_values, int most_depth = 16);

}  // namespace microbatch
