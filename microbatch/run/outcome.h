#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "microbatch/core/median.h"
#include "microbatch/run/trainer.h"

namespace microbatch {

/// A step is refused before it does harm, but steps that are all refused train nothing; without the guard, too.
inline constexpr int most_refused_in_a_row = 10;

/// How long steps took, in memory that does not grow with the run: of a long one every second, fourth, ... step is
/// kept.
class StepTimes {
public:
    static constexpr std::size_t most = 1024;

    void add(double seconds) {
        if (steps_++ % stride_ != 0) return;
        if (seconds_.size() == most) {
            for (std::size_t i = 0; i < most / 2; ++i) seconds_[i] = seconds_[2 * i];
            seconds_.resize(most / 2);
            stride_ *= 2;
        }
        seconds_.push_back(seconds);
    }

    bool empty() const { return seconds_.empty(); }

    double median() const { return microbatch::median(seconds_); }

private:
    std::size_t steps_ = 0, stride_ = 1;
    std::vector<double> seconds_;
};

/// What came of a run so far.
struct Outcome {
    TrainerReport last = {};
    double first_loss = 0.0;
    std::optional<double> held_out = {};  ///< not measured when interrupted
    double seconds = 0.0;
    StepTimes step_seconds = {}, full_step_seconds = {};  ///< of all, and of those of the planned batch
    Plan plan = {};                                       ///< by which full batches were run in the end
    std::int64_t peak_bytes = 0;
    std::int64_t predicted_peak_bytes = 0;
    std::int64_t out_of_memory = 0;
    std::int64_t refused = 0;
    std::int64_t restores = 0;
    int refused_in_a_row = 0;                             ///< up to the last step; batches of weight 0 do not count
    std::optional<std::int64_t> resumed_from = {};        ///< steps
    std::int64_t checkpoints = 0;                         ///< that this process wrote
    double checkpoint_seconds = 0.0;                      ///< that training waited for them
    bool checkpointed = false;                            ///< its last state is in a checkpoint
    std::optional<std::int64_t> healthy_checkpoint = {};  ///< steps of the newest one of a run that diverged
    bool weights_written = false;                         ///< false: those of a run before stay
    bool interrupted = false;
    bool overfits = false;      ///< the length was reached, and the held-out loss alone is above the first losses
    bool ended_worse = false;   ///< the length was reached, with losses above the first: see ends_worse()
    bool ended_in_nan = false;  ///< the length was reached, by steps that were refused because they are not finite

    bool diverged() const { return last.diverged || ended_in_nan || refused_in_a_row >= most_refused_in_a_row; }

    /// Of those of the planned batch, where there are any.
    double median_step_seconds() const {
        return (full_step_seconds.empty() ? step_seconds : full_step_seconds).median();
    }

    /// Writes what a resumed run goes on counting from.
    void save(const StateWriter& writer) const;

    /// Reads it back. Errors: ErrorKind::bad_data.
    static Outcome from(const StateReader& reader);

    /// Counts the last step in.
    void add(std::int64_t peak, std::optional<std::int64_t> predicted, std::int64_t planned_batch) {
        peak_bytes = std::max(peak_bytes, peak);
        predicted_peak_bytes = std::max(predicted_peak_bytes, predicted.value_or(0));
        step_seconds.add(last.seconds);
        if (last.samples == planned_batch) full_step_seconds.add(last.seconds);
        if (last.step.out_of_memory > 0) plan = last.step.plan;
        out_of_memory += last.step.out_of_memory;
        if (last.progress.steps == 1) first_loss = last.step.loss;
        if (!last.step.applied) ++refused;
        if (last.went_back_to) ++restores;
        const bool bad = !last.step.applied && last.step.weight > 0.0;
        refused_in_a_row = bad && !last.went_back_to ? refused_in_a_row + 1 : 0;
    }
};

}  // namespace microbatch
