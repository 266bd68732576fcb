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
    /// The batch over the run, instead of `batch`; the schedule's rate applies to its first stage.
    std::optional<BatchSchedule> batches = {};
    RateRule rate_rule = RateRule::none;    ///< how the rate is scaled with `batches`: none, linear or sqrt
    Interval length{0, Unit::steps};        ///< how long to train; the last batch may be smaller
    std::optional<Schedule> schedule = {};  ///< empty: the optimizer's learning rate is not changed
    std::uint64_t seed = 0;                 ///< for the order of the samples
    /// Refuses steps that exceed its bounds; if empty, only non-finite steps are refused. A smaller last batch is not
    /// checked.
    std::optional<SpikeGuardOptions> guard = {};
    /// What to do when the guard detects a divergence; if empty, the caller decides.
    std::optional<RecoveryOptions> recovery = {};
    std::int64_t noise_every = 0;  ///< steps between measurements of the gradient noise; 0: never
    /// Called after every micro-batch except the last one of a step: true ends step() there, see TrainerReport::paused.
    StopToken stop = {};
    /// What can free memory when it runs out, before snapshots are moved to files.
    Reclaimers reclaimers = {};
    /// Of data that indices alone do not determine, such as a stream: part of the run's state, as `data/own/`. Borrowed.
    Stateful* data_state = nullptr;
};

/// The report of a batch and the progress of the run.
struct TrainerReport {
    StepReport step;
    /// The batch was interrupted between two micro-batches; progress is that of before it. The next step() resumes it.
    bool paused = false;
    Progress progress;         ///< after this batch, even if it was not applied
    std::int64_t samples = 0;  ///< in this batch
    double seconds = 0.0;      ///< wall time, including loading the data; of an interrupted batch, of all its parts
    bool diverged =
        false;  ///< the guard says that continuing does not help; the step was not applied, and step.reason says why
    /// If the run diverged (step.reason says why) and was rolled back: the step whose parameters and optimizer state
    /// were restored.
    std::optional<std::int64_t> rolled_back_to = {};
    /// The batch, in samples, at which the gradient noise is as large as the gradient, averaged over the measurements
    /// so far; empty if undefined: see NoiseAverage.
    std::optional<double> noise_batch = {};
    std::int64_t snapshot_bytes = 0;  ///< the memory of snapshots during the step
    std::string warning = {};         ///< for the caller; the run continues
};

/// Additional data for the record of a step.
struct StepMeasures {
    std::int64_t peak_bytes = 0;
    std::optional<std::int64_t> predicted_peak_bytes = {};  ///< empty if there is no prediction
    std::optional<double> predicted_step_seconds = {};
};

StepRecord record_of(const TrainerReport& report, const StepMeasures& measures);

/// Draws batches, sets the learning rate and steps. The samples of a micro-batch are loaded when needed, so the whole
/// batch is never in memory: `while (!trainer.done()) report = trainer.step();`
///
/// State:     `model/ optimizer/ gate/ noise/ data/ rng/ caps/ batch/ recovery/ run/`: everything needed to continue,
///            between two steps or after a paused one. A trainer with the same model, optimizer, data and options
///            resumes bit-for-bit with the same plan and threads; plan and length may differ. It is loaded one tensor
///            at a time.
/// Ownership: borrows accumulator and dataset, which must outlive this.
/// Threads:   no two calls at the same time.
class Trainer final : public Stateful {
public:
    /// Errors: ErrorKind::usage if batch < 1, length < 0, a schedule is not valid, the dataset is
    ///         empty or has less than one token per sample, there is recovery without a guard, the rate rule changes
    ///         the optimizer's constants, noise_every < 0; as SpikeGuard and Recovery.
    Trainer(Accumulator& accumulator, const Dataset& dataset, LossFunction loss, TrainerOptions options);

    /// Trains on the next batch: as many samples as the options say, or the rest of the length.
    /// Errors: as Accumulator::step() and the dataset's get(); ErrorKind::usage if done(), or if the progress would
    ///         exceed 64 bits. On any exception, the position in the data and the gate are unchanged.
    TrainerReport step();

    /// Errors: ErrorKind::usage if a buffer of the model has a different name or shape than at construction, because
    ///         the saved state could not be loaded.
    void save(const StateWriter& writer) const override;
    Commit prepare(const StateReader& reader) override;

    /// True if a batch was interrupted between two micro-batches: the next step() resumes it.
    bool is_paused() const { return partial_.has_value(); }

    /// Drops that batch as if it had not been started; the generators are not rewound.
    void discard_partial();

    bool done() const { return at_.progress.in(options_.length.unit) >= options_.length.count; }
    const Progress& progress() const { return at_.progress; }

    /// The learning rate for the next step(). Requires: not done().
    double next_learning_rate() const;

private:
    void validate_options() const;
    void begin_step(TrainerReport& report);
    void keep_snapshot(TrainerReport& report);
    void agree_on_snapshots(TrainerReport& report);
    StepOptions step_options(const TrainerReport& report);
    std::int64_t full_batch() const;
    std::int64_t samples_left() const;
    void seed_rank() const;
    Progress next_batch() const;
    void add_noise(TrainerReport& report);
    void roll_back(TrainerReport& report);
    void drop_partial_of_another(const BatchSource& batch);
    bool is_healthy() const;
    void require_first_buffers(const StateReader& buffers) const;

    /// The progress of the run.
    struct Position {
        Sampler sampler;
        NoiseAverage noise;
        Progress progress = {};
        double own_rate = 0.0;         // without a schedule: of the optimizer, before the first roll-back
        std::int64_t last_batch = 0;   // the full batch of the last step
        std::int64_t shrunk_at = 0;    // the step after which the batch last became smaller
        double partial_seconds = 0.0;  // the time of the partial batch so far
    };

    Accumulator& accumulator_;
    const Dataset& dataset_;
    LossFunction loss_;
    TrainerOptions options_;
    Position at_;
    NamedTensors first_buffers_;  // of the model at construction, without values
    std::optional<SpikeGate> gate_;
    std::optional<Recovery> recovery_;
    std::optional<PartialBatch> partial_;
    std::string partial_warning_;  // of the interrupted step, not yet reported
};

/// True if the run ends on any rank, because of `stop` of the options or because it has diverged there. All ranks, between
/// two steps.
bool ends_on_any_rank(const Accumulator& accumulator, const TrainerOptions& options, bool diverged);

/// Drops the partial batch of a trainer's state: the model and the generators are those of before it.
void drop_partial_batch(StateDict& run);

/// Makes the state of a trainer that of a model on other devices: without its partial batch, and with the generators of
/// these devices as they are. Changes nothing if they are the same.
void move_to_devices_of(const Model& model, StateDict& run);

/// Mean loss over the dataset, or its first `most` samples, `micro_batch` samples at a time, without gradients: the sum
/// of the sums / the sum of the weights. The loss function's model must already be in evaluation mode. 0 if the weight
/// is 0.
/// Errors: ErrorKind::usage if micro_batch < 1 or a loss is not valid; whatever the loss function throws.
double mean_loss(const Dataset& dataset, std::int64_t micro_batch, const LossFunction& loss,
                 std::int64_t most = std::numeric_limits<std::int64_t>::max());

}  // namespace microbatch
