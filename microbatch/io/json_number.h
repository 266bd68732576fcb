#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>

namespace microbatch {

/// A double as JSON: the number itself, or the string "nan", "inf" or "-inf", for which JSON has no numbers.
inline nlohmann::ordered_json json_number(double value) {
    if (std::isfinite(value)) return value;
    if (std::isnan(value)) return "nan";
    return value > 0.0 ? "inf" : "-inf";
}

/// Reads it back. Throws nlohmann::json::exception if it is something else.
inline double number_from(const nlohmann::json& value) {
    if (!value.is_string()) return value.get<double>();
    const auto& word = value.get_ref<const std::string&>();
    if (word == "inf") return std::numeric_limits<double>::infinity();
    if (word == "-inf") return -std::numeric_limits<double>::infinity();
    if (word == "nan") return std::numeric_limits<double>::quiet_NaN();
    return nlohmann::json(word).get<double>();  // throws
}

/// Reads a count of at least 0. Throws std::invalid_argument if it is invalid: converting a number beyond 63 bits is
/// undefined.
inline std::int64_t count_from(const nlohmann::json& number) {
    const bool sound = number.is_number_unsigned() && number.get<std::uint64_t>() <= INT64_MAX;
    if (!sound) throw std::invalid_argument("invalid count");
    return number.get<std::int64_t>();
}

}  // namespace microbatch
