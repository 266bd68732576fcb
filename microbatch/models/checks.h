#pragma once

#include <cstdint>
#include <limits>
#include <string_view>

#include "microbatch/core/error.h"

namespace microbatch {

/// Checks one size of a model's configuration.
/// Errors: ErrorKind::usage, naming the model, the setting and its value, unless 1 <= value < 2^31.
inline void require_size(std::string_view model, std::string_view name, std::int64_t value) {
    // The upper limit keeps products with small factors, such as 4 * width, inside 64 bits.
    constexpr std::int64_t largest = std::numeric_limits<std::int32_t>::max();
    require_that(value >= 1 && value <= largest, model, ": ", name, " is ", value, "; give 1 to ", largest);
}

/// Checks an estimate of a model's parameters. Errors: ErrorKind::usage if 64 bits cannot count them.
inline void require_countable(std::string_view model, double parameters, std::int64_t layers, std::int64_t width) {
    require_that(parameters <= 0x1p62, model, ": ", parameters, " parameters are too many; layers ", layers,
                 " or width ", width, " is too large");
}

}  // namespace microbatch
