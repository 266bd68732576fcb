#pragma once

#include <cstdint>
#include <string_view>

namespace microbatch {

/// Checks one size of a model's configuration.
/// Errors: ErrorKind::usage, naming the model, the setting and its value, unless 1 <= value < 2^31.
void require_size(std::string_view model, std::string_view name, std::int64_t value);

}  // namespace microbatch
