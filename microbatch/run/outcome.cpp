#include "microbatch/run/outcome.h"

namespace microbatch {

void Outcome::save(const StateWriter& writer) const {
    writer.put("loss", last.step.loss);
    writer.put("reason", last.step.reason);
    writer.put("gradient_norm", last.step.gradient_norm);
    if (last.noise_batch) writer.put("noise_batch", *last.noise_batch);
    writer.put("first_loss", first_loss);
    writer.put("seconds", seconds);
    writer.put("peak_bytes", peak_bytes);
    writer.put("predicted_peak_bytes", predicted_peak_bytes);
    writer.put("out_of_memory", out_of_memory);
    writer.put("refused", refused);
    writer.put("restores", restores);
    writer.put("refused_in_a_row", refused_in_a_row);
}

Outcome Outcome::from(const StateReader& reader) {
    constexpr std::int64_t most = INT64_MAX / 2;  // totals continue from it, so it must be far from the maximum
    Outcome outcome;
    outcome.last.step.loss = reader.number("loss");
    outcome.last.step.reason = reader.word("reason");
    outcome.last.step.gradient_norm = reader.number("gradient_norm");
    if (reader.has("noise_batch")) outcome.last.noise_batch = reader.number("noise_batch");
    outcome.first_loss = reader.number("first_loss");
    outcome.seconds = reader.positive("seconds");
    outcome.peak_bytes = reader.count("peak_bytes");
    outcome.predicted_peak_bytes = reader.count("predicted_peak_bytes");
    outcome.out_of_memory = reader.count("out_of_memory", 0, most);
    outcome.refused = reader.count("refused", 0, most);
    outcome.restores = reader.count("restores", 0, most);
    outcome.refused_in_a_row = static_cast<int>(reader.count("refused_in_a_row", 0, 1000));
    return outcome;
}

}  // namespace microbatch
