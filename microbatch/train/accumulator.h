#pragma once

#include <limits>
#include <string_view>

#include "microbatch/optim/optimizer.h"
#include "microbatch/train/gatherer.h"

namespace microbatch {

struct AccumulatorOptions {
    Plan plan = {};                                              ///< how a batch is cut
    double clip_norm = std::numeric_limits<double>::infinity();  ///< largest norm of the mean gradient that is applied
};

/// What became of one batch.
struct StepReport {
    double loss = 0.0;               ///< mean over the batch's weight, at the parameters before the step
    double weight = 0.0;             ///< samples or target tokens, as the loss function counts
    double gradient_norm = 0.0;      ///< of the batch's mean gradient, before clipping
    double learning_rate = 0.0;      ///< at which the step was, or would have been, taken
    std::int64_t micro_batches = 0;  ///< how many the batch was cut into
    bool applied = false;            ///< false: the parameters are as they were
    std::string_view reason = {};    ///< why not applied; empty if it was
};

/// Why a batch should not be applied: "zero weight", "loss is not finite" or "gradient norm is not finite"; empty if
/// nothing speaks against it.
std::string_view reason_to_refuse(const Gathered& gathered);

/// One optimizer step for a whole batch, however it is cut.
///
///     Accumulator accumulator(parameters_of(model), optimizer, {.plan = {.micro_batch = 8}, .clip_norm = 1.0});
///     for (const Batch& batch : batches) StepReport report = accumulator.step(batch, loss);
///
/// A loop that makes its own micro-batches streams them instead:
///
///     accumulator.begin();
///     for (...) accumulator.add({loss_sum, weight});
///     accumulator.finish();
///     accumulator.apply();
///
/// Formula:  g = (sum of the micro-batches' loss-sum gradients) / (sum of their weights), clipped once, one step.
/// Source:   reference: docs/how-it-works.md, section 1. Deviation: none.
/// State:    between gather (or finish) and apply everything about the batch is known and no parameter has changed.
/// Ownership: borrows the optimizer, which must outlive this; shares the parameters' tensors.
/// Threads:  no two calls at the same time.
class Accumulator {
public:
    /// Errors: ErrorKind::usage if the optimizer updates a tensor that is not among the parameters (its gradients would
    /// never be cleared), the plan's micro-batch is below 1, clip_norm is not above 0, or as Gatherer's constructor.
    Accumulator(const Parameters& parameters, Optimizer& optimizer, AccumulatorOptions options = {});

    /// Covers parameters that were added to the model; give them to the optimizer too.
    void track(const Parameters& parameters) { gatherer_.track(parameters); }

    /// gather(), then apply(), or discard() if there is a reason_to_refuse(). If the loss function, its backward or
    /// anything else throws before the optimizer steps, no gradient is left and no parameter has changed; what the loss
    /// function itself changed (generators, batch statistics) has.
    StepReport step(const Batch& batch, const LossFunction& loss);

    /// All gradients of the batch, no update yet. Errors: see Gatherer::gather().
    Gathered gather(const Batch& batch, const LossFunction& loss);

    void begin();                        ///< see Gatherer::begin()
    void add(const WeightedLoss& loss);  ///< see Gatherer::add()
    Gathered finish();                   ///< see Gatherer::finish()

    /// Divides by the weight, clips, steps, clears. Steps whatever the gradients are, NaN included; only weight 0,
    /// where there is nothing to divide by, is reported as not applied. Errors: ErrorKind::usage if nothing is
    /// gathered. If the optimizer throws, the gradients are cleared and the parameters are as it left them.
    StepReport apply();

    /// Drops what is gathered, without an update; the report says why. Allowed at any time.
    StepReport discard(std::string_view reason);

    /// How the next batch is cut. Errors: ErrorKind::usage if the micro-batch is below 1.
    void set_plan(const Plan& plan);
    const Plan& plan() const { return options_.plan; }

    Optimizer& optimizer() const { return optimizer_; }

private:
    void refuse_unknown_parameters() const;
    StepReport report() const;

    Gatherer gatherer_;
    Optimizer& optimizer_;
    AccumulatorOptions options_;
    Gathered gathered_;
    bool ready_ = false;  // gathered, and neither applied nor discarded
};

}  // namespace microbatch
