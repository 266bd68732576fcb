#pragma once

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <vector>

#include "microbatch/core/median.h"
#include "microbatch/run/trainer.h"

namespace microbatch {

/// So many refused steps in a row stop a run, even without the guard: they do no harm, but train nothing.
inline constexpr int most_refused_in_a_row = 10;

/// Step times in bounded memory: of a long run, every second, fourth, ... step is kept.
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

/// The results of a run so far.
struct Outcome {
    TrainerReport last = {};
    double first_loss = 0.0;
    std::optional<double> held_out = {};  ///< not measured if interrupted
    double seconds = 0.0;
    StepTimes step_seconds = {}, full_step_seconds = {};  ///< of all steps, and of those with the planned batch
    Plan plan = {};                                       ///< with which full batches were run at the end
    std::int64_t peak_bytes = 0;
    std::int64_t predicted_peak_bytes = 0;
    std::int64_t out_of_memory = 0;
    std::int64_t refused = 0;
    std::int64_t restores = 0;
    int refused_in_a_row = 0;                       ///< up to the last step, not counting batches of weight 0
    std::optional<std::int64_t> resumed_from = {};  ///< steps
    std::int64_t checkpoints = 0;                   ///< written by this process
    double checkpoint_seconds = 0.0;                ///< for which training waited
    bool checkpointed = false;                      ///< a checkpoint has its last state
    std::optional<std::int64_t> healthy_checkpoint =
        {};                        ///< steps of the newest healthy checkpoint, if the run diverged
    bool weights_written = false;  ///< false: the weights of a previous run are kept
    bool interrupted = false;
    bool overfits = false;      ///< the run reached its length, and only the held-out loss is above the first losses
    bool ended_worse = false;   ///< the run reached its length, with losses above the first: see ends_worse()
    bool ended_in_nan = false;  ///< the run reached its length, but the last steps were refused as not finite

    bool diverged() const { return last.diverged || ended_in_nan || refused_in_a_row >= most_refused_in_a_row; }

    /// Of the steps with the planned batch, if there are any.
    double median_step_seconds() const {
        return (full_step_seconds.empty() ? step_seconds : full_step_seconds).median();
    }

    /// Writes the totals with which a resumed run continues.
    void save(const StateWriter& writer) const;

    /// Reads it back. Errors: ErrorKind::bad_data.
    static Outcome from(const StateReader& reader);

    /// Adds the last step to the totals.
    void add(std::int64_t peak, std::optional<std::int64_t> predicted, std::int64_t planned_batch) {
        peak_bytes = std::max(peak_bytes, peak);
        predicted_peak_bytes = std::max(predicted_peak_bytes, predicted.value_or(0));
        step_seconds.add(last.seconds);
        if (last.samples == planned_batch) full_step_seconds.add(last.seconds);
        if (last.step.out_of_memory > 0) plan = last.step.plan;
        out_of_memory += last.step.out_of_memory;
        if (last.progress.steps == 1) first_loss = last.step.loss;
        if (!last.step.applied) ++refused;
        if (last.rolled_back_to) ++restores;
        const bool bad = !last.step.applied && last.step.weight > 0.0;
        refused_in_a_row = bad && !last.rolled_back_to ? refused_in_a_row + 1 : 0;
    }
};

/// Sets ended_worse and overfits of a run that reached its length, from its held-out loss and the logged steps that were
/// applied and not rolled back: see ends_worse(). Without a readable log, nothing changes.
void judge_end(Outcome& outcome, const std::filesystem::path& folder);

}  // namespace microbatch
