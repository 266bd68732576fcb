#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "microbatch/core/batch_schedule.h"
#include "microbatch/core/learning_rate.h"
#include "microbatch/core/noise_scale.h"
#include "microbatch/core/schedule.h"
#include "microbatch/core/spike_guard.h"
#include "microbatch/core/units.h"
#include "microbatch/data/dataset.h"
#include "microbatch/data/sampler.h"
#include "microbatch/run/recovery.h"
#include "microbatch/run/trainer_state.h"
#include "microbatch/step/accumulator.h"

namespace microbatch {

struct TrainerOptions {
    std::int64_t batch = 1;  ///< samples per step
    /// The batch over the run, in the place of `batch`; the schedule's rate is that of its first stage.
    std::optional<BatchSchedule> batches = {};
    RateRule rate_rule = RateRule::none;    ///< how the rate follows `batches`: none, linear or sqrt
    Interval length{0, Unit::steps};        ///< how long to train; the last batch is smaller where it must be
    std::optional<Schedule> schedule = {};  ///< none: the optimizer's learning rate is left alone
    std::uint64_t seed = 0;                 ///< of the order of the samples
    /// Steps that are beyond what is usual are refused; none: only those that are not finite. A last, smaller batch is
    /// not judged.
    std::optional<SpikeGuardOptions> guard = {};
    /// What is done where the guard says that the run has diverged; none: nothing, whoever trains decides.
    std::optional<RecoveryOptions> recovery = {};
    std::int64_t noise_every = 0;  ///< steps from one measure of the gradient's noise to the next; 0: none
    /// Asked after every micro-batch but a step's last: true ends step() there, see TrainerReport::paused.
    std::function<bool()> pause = {};
    /// See StepOptions::release_memory.
    std::function<bool()> release_memory = {};
};

/// A batch's report, with where in the run it was.
struct TrainerReport {
    StepReport step;
    /// The batch was left between two micro-batches, and progress is that of before it: the next step() goes on there.
    bool paused = false;
    Progress progress;         ///< after this batch; a batch that was not applied counts too
    std::int64_t samples = 0;  ///< in this batch
    double seconds = 0.0;      ///< wall time, fetching the data included; of a batch that was left, all its parts
    bool diverged = false;     ///< the guard says that going on does not help; not applied, step.reason says why
    /// The run had diverged, step.reason says why, and went back: parameters and optimizer are as after so many steps.
    std::optional<std::int64_t> went_back_to = {};
    /// Batch, in samples, at which the gradient's noise is as large as the gradient; averaged over the measures so far,
    /// none where it is undefined: see NoiseAverage.
    std::optional<double> noise_batch = {};
    std::int64_t snapshot_bytes = 0;  ///< that snapshots took of memory beside the step
    std::string warning = {};         ///< what whoever trains should know, and the run can do without
};

/// Draws batches, sets the learning rate, steps; the samples of a micro-batch are fetched when its turn comes, so that
/// the batch is never held whole: `while (!trainer.done()) report = trainer.step();`
///
/// Ownership: borrows accumulator and dataset, which must outlive this.
/// Threads:   no two calls at the same time.
class Trainer {
public:
    /// Errors: ErrorKind::usage if batch < 1, length < 0, a schedule is not valid, the dataset is
    ///         empty or has less than one token per sample, there is recovery without a guard, the rate rule is another
    ///         one, noise_every < 0; as SpikeGuard and Recovery.
    Trainer(Accumulator& accumulator, const Dataset& dataset, LossFunction loss, TrainerOptions options);

    /// Trains on the next batch: as many samples as the options say, or what is left of the length.
    /// Errors: as Accumulator::step() and the dataset's get(); ErrorKind::usage if done(), or the progress would leave
    /// 64 bits. On any exception the position in the data and the guard are as before.
    TrainerReport step();

    /// All that the run goes on from, between two steps or after one that was paused. Its tensors are this trainer's
    /// own: see own_tensors(). Cost: no copies.
    TrainerState state() const;

    /// Goes on from a state that a trainer of the same model, optimizer, data and options had: the next step is the one
    /// that it would have made, bit for bit with the same plan and threads. The plan and the length may be others.
    /// Memory: one tensor at a time, the optimizer's state without a second copy.
    /// Errors: ErrorKind::bad_data, naming it, if a tensor is missing, too many, of another shape or dtype, or a number
    ///         is impossible; nothing has changed then. What getting a tensor throws: parameters and optimizer are
    ///         then a mixture, not to be trained on.
    void restore(const TrainerState& state);

    bool done() const { return progress_.in(options_.length.unit) >= options_.length.count; }
    const Progress& progress() const { return progress_; }

private:
    /// What the guard was asked about a batch, and said.
    struct Evaluated {
        double loss, gradient_norm;
        Judgement judgement;
    };

    void validate_options() const;
    void begin_step(TrainerReport& report);
    void require_fits(const TrainerState& state) const;
    void require_optimizer(const std::vector<std::size_t>& counts, const StoredTensors& tensors) const;
    void require_point(const RecoveryState::Point& point) const;
    void require_generators(const std::vector<at::Tensor>& states) const;
    void restore_optimizer(const TrainerState& state);
    void restore_open_batch(const OpenBatchState& open);
    std::int64_t full_batch() const;
    std::int64_t samples_left() const;
    Batch next_samples(std::int64_t count);
    void set_learning_rate(const Progress& batch);
    bool batch_shrinks() const { return full_batch() < last_batch_; }
    StepOptions step_options(const TrainerReport& report, std::optional<Evaluated>& evaluated);
    std::string evaluate(const Gathered& gathered, std::optional<Evaluated>& evaluated) const;
    void record(const std::optional<Evaluated>& evaluated, bool applied);
    void add_noise(TrainerReport& report);
    void go_back(TrainerReport& report);

    Accumulator& accumulator_;
    const Dataset& dataset_;
    LossFunction loss_;
    TrainerOptions options_;
    Sampler sampler_;
    Progress progress_;
    std::optional<SpikeGuard> guard_;
    std::optional<Recovery> recovery_;
    NoiseAverage noise_;
    double own_rate_ = 0.0;        // without a schedule: the optimizer's, before the run first went back
    std::int64_t last_batch_ = 0;  // the full batch of the last step
    std::int64_t shrunk_at_ = 0;   // after so many steps it became smaller, the last time
    double open_seconds_ = 0.0;    // that the batch has taken which was left open
    std::string open_warning_;     // not reported yet, as it was left open
};

/// Mean loss over the whole dataset at `micro_batch` samples a time, without gradients: sum of sums / sum of weights.
/// The loss function's model must be in evaluation mode already. 0 if the weight is 0.
/// Errors: ErrorKind::usage if micro_batch < 1 or a loss is not valid; whatever the loss function throws.
double mean_loss(const Dataset& dataset, std::int64_t micro_batch, const LossFunction& loss);

}  // namespace microbatch
