#pragma once

#include <cstdint>
#include <functional>
#include <limits>
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
#include "microbatch/run/step_record.h"
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
    StopToken stop = {};
    /// What can give memory back when it runs out, before snapshots are moved to files.
    Reclaimers reclaimers = {};
};

/// A batch's report, with where in the run it was.
struct TrainerReport {
    StepReport step;
    /// The batch was left between two micro-batches, and progress is that of before it: the next step() resumes it.
    bool paused = false;
    Progress progress;         ///< after this batch; a batch that was not applied counts too
    std::int64_t samples = 0;  ///< in this batch
    double seconds = 0.0;      ///< wall time, fetching the data included; of a batch that was left, all its parts
    bool diverged = false;     ///< the guard says that going on does not help; not applied, step.reason says why
    /// The run had diverged, step.reason says why, and was rolled back: parameters and optimizer are as after so many
    /// steps.
    std::optional<std::int64_t> went_back_to = {};
    /// Batch, in samples, at which the gradient's noise is as large as the gradient; averaged over the measures so far,
    /// none where it is undefined: see NoiseAverage.
    std::optional<double> noise_batch = {};
    std::int64_t snapshot_bytes = 0;  ///< that snapshots took of memory beside the step
    std::string warning = {};         ///< what whoever trains should know, and the run can do without
};

/// What a record holds of a step beside the trainer's own report.
struct StepMeasures {
    std::int64_t peak_bytes = 0;
    std::optional<std::int64_t> predicted_peak_bytes = {};  ///< none if nothing was predicted
    std::optional<double> predicted_step_seconds = {};
};

StepRecord record_of(const TrainerReport& report, const StepMeasures& measures);

/// Draws batches, sets the learning rate, steps; the samples of a micro-batch are fetched when its turn comes, so that
/// the batch is never held whole: `while (!trainer.done()) report = trainer.step();`
///
/// State:     `model/ optimizer/ gate/ noise/ data/ rng/ caps/ batch/ recovery/ run/`: all that the run goes on from,
///            between two steps or after one that was paused. A trainer of the same model, optimizer, data and options
///            resumes bit-for-bit with the same plan and threads; plan and length may be others. It is loaded one
///            tensor at a time.
/// Ownership: borrows accumulator and dataset, which must outlive this.
/// Threads:   no two calls at the same time.
class Trainer final : public Stateful {
public:
    /// Errors: ErrorKind::usage if batch < 1, length < 0, a schedule is not valid, the dataset is
    ///         empty or has less than one token per sample, there is recovery without a guard, the rate rule changes
    ///         the optimizer's constants, noise_every < 0; as SpikeGuard and Recovery.
    Trainer(Accumulator& accumulator, const Dataset& dataset, LossFunction loss, TrainerOptions options);

    /// Trains on the next batch: as many samples as the options say, or what is left of the length.
    /// Errors: as Accumulator::step() and the dataset's get(); ErrorKind::usage if done(), or the progress would leave
    /// 64 bits. On any exception the position in the data and the gate are as before.
    TrainerReport step();

    /// Errors: ErrorKind::usage if a buffer of the model has another name or shape than when this was made: what is
    ///         saved could not be loaded.
    void save(const StateWriter& writer) const override;
    Commit prepare(const StateReader& reader) override;

    /// True if a batch was left between two micro-batches: the next step() resumes it.
    bool is_paused() const { return partial_.has_value(); }

    /// Drops that batch, as if it had not been begun; generators go on.
    void discard_partial();

    bool done() const { return at_.progress.in(options_.length.unit) >= options_.length.count; }
    const Progress& progress() const { return at_.progress; }

    /// The learning rate that the next step() takes. Requires: not done().
    double next_learning_rate() const;

private:
    void validate_options() const;
    void begin_step(TrainerReport& report);
    StepOptions step_options(const TrainerReport& report);
    std::int64_t full_batch() const;
    std::int64_t samples_left() const;
    Progress next_batch() const;
    void add_noise(TrainerReport& report);
    void roll_back(TrainerReport& report);
    void drop_partial_of_another(const BatchSource& batch);
    bool is_healthy() const;
    void require_first_buffers(const StateReader& buffers) const;

    /// Where the run is.
    struct Position {
        Sampler sampler;
        NoiseAverage noise;
        Progress progress = {};
        double own_rate = 0.0;         // without a schedule: the optimizer's, before the first roll-back
        std::int64_t last_batch = 0;   // the full batch of the last step
        std::int64_t shrunk_at = 0;    // after so many steps it became smaller, the last time
        double partial_seconds = 0.0;  // that the partial batch has taken so far
    };

    Accumulator& accumulator_;
    const Dataset& dataset_;
    LossFunction loss_;
    TrainerOptions options_;
    Position at_;
    NamedTensors first_buffers_;  // the model's when this was made, without values
    std::optional<SpikeGate> gate_;
    std::optional<Recovery> recovery_;
    std::optional<PartialBatch> partial_;
    std::string partial_warning_;  // of the step that was left, not reported yet
};

/// Mean loss over the dataset, or its first `most` samples, at `micro_batch` samples a time, without gradients: sum of
/// sums / sum of weights.
/// The loss function's model must be in evaluation mode already. 0 if the weight is 0.
/// Errors: ErrorKind::usage if micro_batch < 1 or a loss is not valid; whatever the loss function throws.
double mean_loss(const Dataset& dataset, std::int64_t micro_batch, const LossFunction& loss,
                 std::int64_t most = std::numeric_limits<std::int64_t>::max());

}  // namespace microbatch
