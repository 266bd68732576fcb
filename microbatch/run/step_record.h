#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <variant>

namespace microbatch {

/// One step of a run as it is logged: see step_fields() for the keys.
struct StepRecord {
    std::int64_t step = 0, samples = 0, tokens = 0;
    std::int64_t batch = 0;  ///< samples in this step
    double loss = 0.0, weight = 0.0, learning_rate = 0.0, gradient_norm = 0.0;
    std::int64_t micro_batch = 0, micro_batches = 0;
    bool recompute = false;
    std::int64_t out_of_memory = 0;  ///< how many times the step was repeated
    double step_seconds = 0.0;
    double update_seconds = 0.0;  ///< of those, in the optimizer
    std::optional<double> predicted_step_seconds = {};
    std::int64_t peak_bytes = 0;
    std::optional<std::int64_t> predicted_peak_bytes = {};
    bool applied = true;
    std::string reason = {};                          ///< why it was not applied
    std::optional<std::int64_t> rolled_back_to = {};  ///< the step whose parameters were restored
    std::optional<double> gradient_variance = {};     ///< see NoiseMeasure
    std::optional<double> squared_gradient = {};
    std::optional<double> noise_batch = {};  ///< in samples
};

/// One field of a record, for all code that writes, reads or draws it.
struct StepField {
    using Member =
        std::variant<std::int64_t StepRecord::*, double StepRecord::*, bool StepRecord::*, std::string StepRecord::*,
                     std::optional<std::int64_t> StepRecord::*, std::optional<double> StepRecord::*>;

    const char* key;  ///< in metrics.jsonl
    Member member;
    const char* scalar = nullptr;  ///< TensorBoard's tag; null: not drawn
    bool charted = false;          ///< a column of the report

    /// The value as a number; empty if it is not one (also for text).
    std::optional<double> number(const StepRecord& record) const;
};

/// The fields in the order of metrics.jsonl.
std::span<const StepField> step_fields();

/// A JSON object with every field, in one line. Non-finite numbers are the strings "nan", "inf" and "-inf"; a field
/// without a value is null.
std::string to_json(const StepRecord& record);

/// Reads it back. The text is not trusted. Errors: std::invalid_argument if it is not such an object.
StepRecord step_record_from(std::string_view json);

}  // namespace microbatch
