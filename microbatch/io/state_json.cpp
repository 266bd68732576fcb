#include "microbatch/io/state_json.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <variant>

#include "microbatch/core/error.h"
#include "microbatch/io/json.h"

namespace microbatch {
namespace {

using Json = nlohmann::json;
using Written = nlohmann::ordered_json;

constexpr std::size_t most_values = 400'000;

std::int64_t whole_from(const Json& value) {
    if (value.is_number_unsigned() && value.get<std::uint64_t>() > INT64_MAX) {
        throw std::invalid_argument("a number in a list exceeds 63 bits");
    }
    return value.get<std::int64_t>();
}

StateScalar list_from(const Json& list) {
    if (std::all_of(list.begin(), list.end(), [](const Json& one) { return one.is_number_integer(); })) {
        std::vector<std::int64_t> values;
        for (const Json& one : list) values.push_back(whole_from(one));
        return values;
    }
    std::vector<double> values;
    for (const Json& one : list) values.push_back(number_from(one));
    return values;
}

StateScalar scalar_from(const Json& value) {
    if (value.is_boolean()) return value.get<bool>();
    if (value.is_number_unsigned() && value.get<std::uint64_t>() > INT64_MAX) return value.get<std::uint64_t>();
    if (value.is_number_integer()) return value.get<std::int64_t>();
    if (value.is_number_float()) return value.get<double>();
    if (value.is_string()) return value.get<std::string>();
    if (value.is_array()) return list_from(value);
    throw std::invalid_argument("a value is neither a number, a text nor a list");
}

}  // namespace

std::string scalars_to_json(const StateDict& state) {
    Written json = Written::object();
    std::size_t values = 1;
    for (const auto& [name, scalar] : state.scalars()) {
        json[name] = std::visit([](const auto& value) { return json_value(value); }, scalar);
        values += 1 + json[name].size();
    }
    std::string text = json.dump(0, ' ', false, Written::error_handler_t::replace) + "\n";
    if (text.size() > most_scalar_bytes || values > most_values) {
        throw Error(ErrorKind::usage, "the state has too many scalars: ", values, " values, ", text.size(), " bytes");
    }
    return text;
}

void read_scalars(std::string_view json, const std::string& source, StateDict& state) {
    const auto read = [&state](const Json& values) {
        if (!values.is_object()) throw std::invalid_argument("it is not a JSON object");
        for (const auto& [name, value] : values.items()) state.put(name, scalar_from(value));
    };
    read_json(json, most_values, source, " is not a state written by this library", read);
}

}  // namespace microbatch
