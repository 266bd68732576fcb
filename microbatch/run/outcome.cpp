#include "microbatch/run/outcome.h"

#include <cmath>
#include <vector>

#include "microbatch/core/error.h"
#include "microbatch/core/spike_guard.h"
#include "microbatch/run/run_log.h"

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

void judge_end(Outcome& outcome, const std::filesystem::path& folder) {
    std::vector<StepRecord> kept;
    try {
        for (const StepRecord& step : read_run_log(folder).steps) {
            if (step.applied) kept.push_back(step);
            if (!step.rolled_back_to) continue;
            std::erase_if(kept, [&](const StepRecord& one) { return one.step > *step.rolled_back_to; });
        }
    } catch (const Error&) {
        return;  // the log could not be written, which was said
    }
    std::vector<double> losses;
    for (const StepRecord& step : kept) losses.push_back(step.loss);
    // A model may overfit on purpose; after a roll-back, or where it is no number, the training losses hide the damage.
    const bool counts = outcome.restores > 0 || !std::isfinite(outcome.held_out.value_or(0.0));
    outcome.ended_worse = ends_worse(losses, counts ? outcome.held_out : std::nullopt);
    outcome.overfits = !outcome.ended_worse && ends_worse(losses, outcome.held_out);
}

}  // namespace microbatch
