#pragma once

#include <cstddef>
#include <nlohmann/json_fwd.hpp>
#include <string_view>

namespace microbatch {

/// JSON of somebody who is not trusted: a value takes many times the memory of its text, so their number is bounded,
/// and so is how deep they are nested.
///
/// Memory: the text's, and 64 bytes a value. Errors: std::invalid_argument that says why, also where it is no JSON.
nlohmann::json parse_bounded(std::string_view text, std::size_t most_values, int most_depth = 16);

}  // namespace microbatch
