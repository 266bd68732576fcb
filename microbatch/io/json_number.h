#pragma once

#include <cmath>
#include <nlohmann/json.hpp>

namespace microbatch {

/// A double as JSON: the number itself, or "nan", "inf" or "-inf", which JSON has no numbers for.
inline nlohmann::ordered_json json_number(double value) {
    if (std::isfinite(value)) return value;
    if (std::isnan(value)) return "nan";
    return value > 0.0 ? "inf" : "-inf";
}

}  // namespace microbatch
