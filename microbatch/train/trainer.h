#pragma once

#include <cstdint>
#include <optional>

#include "microbatch/core/schedule.h"
#include "microbatch/core/spike_guard.h"
#include "microbatch/core/units.h"
#include "microbatch/train/accumulator.h"
#include "microbatch/train/dataset.h"
#include "microbatch/train/sampler.h"

namespace microbatch {

struct TrainerOptions {
    std::int64_t batch = 1;                 ///< samples per step
    Interval length{0, Unit::steps};        ///< how long to train; the last batch is smaller where it must be
    std::optional<Schedule> schedule = {};  ///< none: the optimizer's learning rate is left alone
    std::uint64_t seed = 0;                 ///< of the order of the samples
    /// Steps that are beyond what is usual are refused; none: only those that are not finite. A last, smaller batch is
    /// not judged.
    std::optional<SpikeGuardOptions> guard = {};
};

/// A batch's report, with where in the run it was.
struct TrainerReport {
    StepReport step;
    Progress progress;         ///< after this batch; a batch that was not applied counts too
    std::int64_t samples = 0;  ///< in this batch
    double seconds = 0.0;      ///< wall time, fetching the data included
    bool diverged = false;     ///< the guard says that going on does not help; not applied, step.reason says why
};

/// Draws batches, sets the learning rate, steps; the samples of a micro-batch are fetched when its turn comes, so that
/// the batch is never held whole: `while (!trainer.done()) report = trainer.step();`
///
/// Ownership: borrows accumulator and dataset, which must outlive this.
/// Threads:   no two calls at the same time.
class Trainer {
public:
    /// Errors: ErrorKind::usage if batch < 1, length < 0, the schedule is not valid, the dataset is
    ///         empty or has less than one token per sample; as SpikeGuard.
    Trainer(Accumulator& accumulator, const Dataset& dataset, LossFunction loss, TrainerOptions options);

    /// Trains on the next batch: options.batch samples, or what is left of the length.
    /// Errors: as Accumulator::step() and the dataset's get(); ErrorKind::usage if done(), or the progress would leave
    /// 64 bits. On any exception the position in the data and the guard are as before.
    TrainerReport step();

    bool done() const { return progress_.in(options_.length.unit) >= options_.length.count; }
    const Progress& progress() const { return progress_; }

private:
    std::int64_t next_batch() const;
    std::string judge_by_guard(const Gathered& gathered, bool& diverged);

    Accumulator& accumulator_;
    const Dataset& dataset_;
    LossFunction loss_;
    TrainerOptions options_;
    Sampler sampler_;
    Progress progress_;
    std::optional<SpikeGuard> guard_;
};

/// Mean loss over the whole dataset at `micro_batch` samples a time, without gradients: sum of sums / sum of weights.
/// The loss function's model must be in evaluation mode already. 0 if the weight is 0.
/// Errors: ErrorKind::usage if micro_batch < 1 or a loss is not valid; whatever the loss function throws.
double mean_loss(const Dataset& dataset, std::int64_t micro_batch, const LossFunction& loss);

}  // namespace microbatch
