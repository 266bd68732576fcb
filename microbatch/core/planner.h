#pragma once

#include <cstdint>
#include <functional>
#include <optional>

#include "microbatch/core/plan_report.h"
#include "microbatch/core/trials.h"

namespace microbatch {

/// What the optimizer's steps took when they were tried.
struct UpdateTrial {
    std::int64_t first_peak_bytes = 0;  ///< of the step that makes the optimizer's state
    std::int64_t later_peak_bytes = 0;
    std::int64_t state_bytes = 0;  ///< the state that the trial made; 0 if it was there before
    double seconds = 0.0;          ///< a later step, clipping included
    double spent_seconds = 0.0;
};

/// A job that can be tried without a trace. The planner asks, a live job answers.
class Rehearsal {
public:
    virtual ~Rehearsal() = default;

    /// Runs one micro-batch of the plan's size as the first of a batch and, if `cut`, as a later one. None if it does
    /// not fit in `allowed_bytes`.
    /// Errors: TooFewSamples if the model cannot train on a single sample.
    virtual std::optional<MicroBatchTrial> micro_batch(const Plan& plan, bool cut, std::int64_t allowed_bytes) = 0;

    /// Seconds of a micro-batch of a plan that was tried and fitted, once more; infinity if it does not fit any longer.
    /// What it costs is what a trial costs.
    virtual double seconds_again(const Plan& plan, bool cut, std::int64_t allowed_bytes) = 0;

    /// The optimizer's first and later step. None if it does not fit in `allowed_bytes`.
    virtual std::optional<UpdateTrial> update(std::int64_t allowed_bytes) = 0;

    /// What is live before a batch begins, activations 0 and without optimizer state that is still to be made;
    /// gradients: what they will take.
    virtual MemoryParts fixed() const = 0;
};

/// Which plans may be chosen.
enum class Recompute { automatic, never, always };

struct PlannerOptions {
    std::int64_t batch = 1;         ///< samples per optimizer step
    std::int64_t budget_bytes = 0;  ///< of all that is live, parameters included
    /// How long the run will be: in a run of a single step no optimizer state is there during the micro-batches.
    std::int64_t steps = 2;
    bool offers_recompute = false;  ///< the model can
    Recompute recompute = Recompute::automatic;
    std::optional<std::int64_t> micro_batch = {};  ///< the only one to look at
    std::int64_t most_bytes = 0;  ///< may be used beyond the budget where no plan fits, to say what the smallest needs
    double most_steps = 3.0;      ///< measuring ends once it has taken as long as this many steps of the best plan,
    double least_seconds = 0.3;   ///< or this long, where steps are so short that nobody would notice
    /// Also tries 1 and 2 with recompute where that cannot pay, at the end and beside the time for measuring: for a
    /// report that says what recompute would take.
    bool whole_table = false;
    std::function<void(const Plan&)> on_trial = {};  ///< called before each trial: progress, or throw to end it
};

/// Finds the fastest plan that fits.
///
/// Tries micro-batches of 1 and 2 (and 3 where those two do not allocate in the same way), matches their allocations
/// one by one, and so knows the peak at every size; the times are taken for affine until seen otherwise. The same with
/// recompute, if not every plan fits without and the whole batch at once promises to be the fastest though a tenth be
/// lost to the second forward pass. Then goes to the plan that promises most (among those within 1 % the smallest
/// micro-batch), by long strides for as long as they leave time for it, until none promises 1 % more: the powers of
/// two, the sizes midway, the fewest equal micro-batches that fit, the whole batch. Every trial checks the prediction
/// made before it, and is part of the next one. With what is left, a third of the time unless much was to be gained,
/// the fastest few take turns, because one sample on a machine that others use, too, tells plans apart by chance. Only
/// a plan that was tried and kept the budget is chosen: the smallest step time; a tie of 1 % goes to the smaller peak.
///
/// An uncut batch never holds gradients during a forward pass, and can fit where a micro-batch of 1 does not. Where the
/// model cannot train on a single sample, no plan has one: micro-batches begin at 2, or at 3 if the batch is odd.
///
/// Units:  bytes, samples, seconds.
/// Errors: ErrorKind::usage if batch, budget, steps or micro_batch is below 1, micro_batch above the batch, or
/// recompute is
///         asked of a model that does not offer it. TooFewSamples if the batch or the micro_batch is 1 and the model
///         cannot train on it. Nothing fits: no error, the report has none chosen. What the rehearsal or on_trial
///         throws passes through.
/// Cost:   most_steps steps' time at most, or least_seconds where that is more, as far as the time of a trial is known
///         before it; with a batch below 16 that beside the trials of 1 and 2. Those, and the optimizer's step, are
///         always tried.
PlanReport make_plan(const PlannerOptions& options, Rehearsal& rehearsal);

}  // namespace microbatch
