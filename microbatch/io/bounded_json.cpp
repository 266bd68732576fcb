#include "microbatch/io/bounded_json.h"

#include <nlohmann/json.hpp>
#include <stdexcept>

namespace microbatch {

nlohmann::json parse_bounded(std::string_view text, std::size_t most_values, int most_depth) {
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

}  // namespace microbatch
