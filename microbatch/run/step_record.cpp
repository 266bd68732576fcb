#include "microbatch/run/step_record.h"

#include <nlohmann/json.hpp>
#include <stdexcept>
#include <type_traits>

#include "microbatch/io/json.h"

namespace microbatch {
namespace {

using Json = nlohmann::json;

void read(const Json& json, std::int64_t& value) {
    value = count_from(json);
}
void read(const Json& json, double& value) {
    value = number_from(json);
}
void read(const Json& json, bool& value) {
    value = json.get<bool>();
}
void read(const Json& json, std::string& value) {
    value = json.get<std::string>();
}
template <class Value>
void read(const Json& json, std::optional<Value>& value) {
    if (json.is_null()) return;
    read(json, value.emplace());
}

}  // namespace

std::span<const StepField> step_fields() {
    using R = StepRecord;
    static const StepField fields[] = {
        {"step", &R::step, nullptr, true},
        {"samples", &R::samples},
        {"tokens", &R::tokens},
        {"batch", &R::batch, "train/batch", true},
        {"loss", &R::loss, "train/loss", true},
        {"weight", &R::weight},
        {"learning_rate", &R::learning_rate, "train/learning_rate", true},
        {"gradient_norm", &R::gradient_norm, "train/gradient_norm", true},
        {"micro_batch", &R::micro_batch},
        {"micro_batches", &R::micro_batches},
        {"recompute", &R::recompute},
        {"out_of_memory", &R::out_of_memory},
        {"step_seconds", &R::step_seconds, "time/step_seconds", true},
        {"update_seconds", &R::update_seconds, nullptr, true},
        {"predicted_step_seconds", &R::predicted_step_seconds, nullptr, true},
        {"peak_bytes", &R::peak_bytes, "memory/peak_bytes", true},
        {"predicted_peak_bytes", &R::predicted_peak_bytes, "memory/predicted_peak_bytes", true},
        {"applied", &R::applied, "train/applied"},
        {"reason", &R::reason},
        {"rolled_back_to", &R::rolled_back_to},
        {"gradient_variance", &R::gradient_variance},
        {"squared_gradient", &R::squared_gradient},
        {"noise_batch", &R::noise_batch, "noise/noise_batch", true},
    };
    return fields;
}

std::optional<double> StepField::number(const StepRecord& record) const {
    return std::visit(
        [&record](auto field) -> std::optional<double> {
            const auto& value = record.*field;
            using Value = std::remove_cvref_t<decltype(value)>;
            if constexpr (std::is_arithmetic_v<Value>) {
                return static_cast<double>(value);
            } else if constexpr (std::is_same_v<Value, std::string>) {
                return std::nullopt;
            } else {
                return value ? std::optional(static_cast<double>(*value)) : std::nullopt;
            }
        },
        member);
}

std::string to_json(const StepRecord& record) {
    nlohmann::ordered_json json;
    for (const StepField& field : step_fields()) {
        json[field.key] = std::visit([&record](auto member) { return json_value(record.*member); }, field.member);
    }
    return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}

StepRecord step_record_from(std::string_view json) {
    constexpr std::size_t most_values = 1000;  // of a record, which has about 25
    const Json values = parse_bounded(json, most_values);
    StepRecord record;
    try {
        for (const StepField& field : step_fields()) {
            std::visit([&](auto member) { read(values.at(field.key), record.*member); }, field.member);
        }
    } catch (const Json::exception& error) {
        throw std::invalid_argument(error.what());
    }
    return record;
}

}  // namespace microbatch
