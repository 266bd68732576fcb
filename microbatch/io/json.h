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

/// A value as JSON. A number that JSON has none for is "nan", "inf" or "-inf"; an optional without a value is null.
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

/// Reads a number back. Throws nlohmann::json::exception where it is something else.
inline double number_from(const nlohmann::json& value) {
    if (!value.is_string()) return value.get<double>();
    const auto& word = value.get_ref<const std::string&>();
    if (word == "inf") return std::numeric_limits<double>::infinity();
    if (word == "-inf") return -std::numeric_limits<double>::infinity();
    if (word == "nan") return std::numeric_limits<double>::quiet_NaN();
    return nlohmann::json(word).get<double>();  // throws
}

/// A count that was written, at least 0. Throws std::invalid_argument where it is none: a conversion of what is beyond
/// 63 bits is undefined.
inline std::int64_t count_from(const nlohmann::json& number) {
    const bool sound = number.is_number_unsigned() && number.get<std::uint64_t>() <= INT64_MAX;
    if (!sound) throw std::invalid_argument("a count is none");
    return number.get<std::int64_t>();
}

/// JSON of somebody who is not trusted: a value takes many times the memory of its text, so their number is bounded,
/// and so is how deep they are nested.
///
/// Memory: the text's, and 64 bytes a value. Errors: std::invalid_argument that says why, also where it is no JSON.
inline nlohmann::json parse_bounded(std::string_view text, std::size_t most_values) {
    constexpr int most_depth = 16;
    std::size_t values = 0;
    const auto count = [&](int depth, nlohmann::json::parse_event_t, nlohmann::json&) {
        if (depth > most_depth) throw std::invalid_argument("it is nested too deep");
        if (++values > most_values) throw std::invalid_argument("it has too many values");
        return true;
    };
    try {
        return nlohmann::json::parse(text.begin(), text.end(), count);
    } catch (const nlohmann::json::exception&) {
        throw std::invalid_argument("it is no JSON");
    }
}

/// What `read` makes of such a text.
/// Errors: ErrorKind::bad_data, naming the `source`: why it is not sound, or `otherwise` where `read` finds something
///         else than it looks for.
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
