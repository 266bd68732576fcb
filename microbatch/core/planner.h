#pragma once

#include <cstdint>
#include <functional>
#include <optional>

#include "microbatch/core/plan_report.h"
#include "microbatch/core/trials.h"

namespace microbatch {

/// Memory and time of the optimizer's steps, as measured by a trial.
struct UpdateTrial {
    std::int64_t first_peak_bytes = 0;  ///< of the step that creates the optimizer's state
    std::int64_t later_peak_bytes = 0;
    std::int64_t state_bytes = 0;  ///< that the trial created; 0 if the optimizer had state already
    double seconds = 0.0;          ///< a later step, clipping included
    double spent_seconds = 0.0;
};

/// A job that can be tried without side effects: the planner requests trials, and a live job runs them.
class Rehearsal {
public:
    virtual ~Rehearsal() = default;

    /// Runs one micro-batch of the plan's size as the first of a batch and, if `cut`, as a later one. Returns nullopt
    /// if it does not fit in `allowed_bytes`.
    /// Errors: TooFewSamples if the model cannot train on a single sample.
    virtual std::optional<MicroBatchTrial> micro_batch(const Plan& plan, bool cut, std::int64_t allowed_bytes) = 0;

    /// Times a micro-batch of a plan again that was tried and fitted, in seconds; infinity if it no longer fits. Costs
    /// as much as a trial.
    virtual double seconds_again(const Plan& plan, bool cut, std::int64_t allowed_bytes) = 0;

    /// Tries the optimizer's first and a later step. Returns nullopt if they do not fit in `allowed_bytes`.
    virtual std::optional<UpdateTrial> update(std::int64_t allowed_bytes) = 0;

    /// The memory that is live before a batch begins. Activations are 0; gradients are counted as they will be;
    /// optimizer state that does not exist yet is not counted.
    virtual MemoryParts fixed() const = 0;
};

/// Whether plans with recompute may be chosen.
enum class Recompute { automatic, never, always };

struct PlannerOptions {
    std::int64_t batch = 1;         ///< samples per optimizer step
    std::int64_t budget_bytes = 0;  ///< of all that is live, parameters included
    /// Length of the run. In a run of a single step no optimizer state exists while the micro-batches run.
    std::int64_t steps = 2;
    BatchNorm batch_norm = BatchNorm::naive;  ///< of every plan
    bool offers_recompute = false;            ///< the model supports it
    Recompute recompute = Recompute::automatic;
    std::optional<std::int64_t> micro_batch = {};  ///< the only micro-batch to consider
    std::int64_t most_bytes =
        0;  ///< if no plan fits, up to this much may be used to measure what the smallest plan needs
    double communication_seconds = 0.0;  ///< of a step over several processes, which no trial measures
    double most_steps = 3.0;             ///< measuring ends after the time of this many steps of the best plan,
    double least_seconds = 0.3;          ///< or after this long, where steps are shorter
    /// Also tries the smallest two sizes with recompute where it cannot pay, after and in addition to the time for
    /// measuring, for a report that says what recompute would take.
    bool whole_table = false;
    std::function<void(const Plan&)> on_trial = {};  ///< called before each trial: report progress, or throw to stop
};

/// Finds the fastest plan that fits.
///
/// Tries micro-batches of 1 and 2 (and 3, if the first two do not allocate in the same order), matches their
/// allocations one by one, and from these predicts the peak at every size. Times are assumed to be linear until
/// measured otherwise. Does the same with recompute, unless every plan fits without it, or even the whole batch in one
/// piece would not be the fastest after losing a tenth to the second forward pass. Then tries the most promising plan
/// (of those within 1 %, the smallest micro-batch), in large steps while they leave time for it, until none promises a
/// gain of 1 %. Candidates are the powers of two, the sizes midway between them, the fewest equal micro-batches that
/// fit, and the whole batch. Every trial checks its prediction and improves the next one. In the remaining time (at
/// least a third, unless large gains are possible), the fastest few take turns, because a single measurement on a
/// shared machine cannot distinguish close plans. Only a plan that was tried and stayed within the budget is chosen:
/// the one with the smallest step time; within 1 %, the one with the smaller peak.
///
/// A whole batch never holds gradients during a forward pass, and can fit where a micro-batch of 1 does not. If the
/// model cannot train on a single sample, no plan uses one: micro-batches begin at 2, or at 3 if the batch is odd.
///
/// Units:  bytes, samples, seconds.
/// Errors: ErrorKind::usage if batch, budget, steps or micro_batch is below 1, micro_batch is above the batch, or
///         recompute is requested of a model that does not support it. TooFewSamples if the batch or the micro_batch is
///         1 and the model cannot train on that. If nothing fits, there is no error: the report has no choice.
///         Exceptions from the trials or on_trial pass through.
/// Cost:   at most the time of most_steps steps, or least_seconds if that is more, as far as the time of a trial can be
///         predicted. The first two sizes and the optimizer's step are always tried; with a batch below 16, they do not
///         count.
PlanReport make_plan(const PlannerOptions& options, Rehearsal& rehearsal);

}  // namespace microbatch
