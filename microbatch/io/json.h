#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "microbatch/core/error.h"

namespace microbatch {

/// A value as JSON. Numbers that JSON lacks become "nan", "inf" or "-inf"; an optional without a value becomes null.
template <class Value>
nlohmann::ordered_json json_value(const Value& value) {
    if constexpr (std::is_floating_point_v<Value>) {
        if (std::isnan(value)) return "nan";
        if (std::isinf(value)) return value > 0.0 ? "inf" : "-inf";
        return value;
    } else if constexpr (requires { value.has_value(); }) {
        return value ? json_value(*value) : nullptr;
    } else if constexpr (std::is_same_v<Value, std::vector<double>>) {
        nlohmann::ordered_json list = nlohmann::ordered_json::array();
        for (const double number : value) list.push_back(json_value(number));
        return list;
    } else {
        return value;
    }
}

/// Reads a number back. Throws nlohmann::json::exception if it is something else.
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

/// Parses untrusted JSON: a value takes many times the memory of its text, so the number of values and their nesting
/// depth are bounded.
///
/// Memory: the text, and 64 bytes per value.
/// Errors: std::invalid_argument that says why, also if the text is not valid JSON.
inline nlohmann::json parse_bounded(std::string_view text, std::size_t most_values) {
    constexpr int most_depth = 16;
    std::size_t values = 0;
    const auto count = [&](int depth, nlohmann::json::parse_event_t, nlohmann::json&) {
        if (depth > most_depth) throw std::invalid_argument("it is nested too deeply");
        if (++values > most_values) throw std::invalid_argument("it has too many values");
        return true;
    };
    try {
        return nlohmann::json::parse(text.begin(), text.end(), count);
    } catch (const nlohmann::json::exception&) {
        throw std::invalid_argument("it is not valid JSON");
    }
}

/// Parses such a text and returns the result of `read`.
/// Errors: ErrorKind::bad_data, naming the `source`: why the text is invalid, or `otherwise` if `read` does not find
///         what it expects.
template <class Read>
auto read_json(std::string_view text, std::size_t most_values, const std::string& source, const char* otherwise,
               Read read) {
    try {
        return read(parse_bounded(text, most_values));
    } catch (const nlohmann::json::exception&) {
        throw Error(ErrorKind::bad_data, source, otherwise);
    } catch (const std::invalid_argument& error) {
        throw Error(ErrorKind::bad_data, source, ": ", error.what());
    }
}

}  // namespace microbatch
