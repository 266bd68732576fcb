#pragma once

#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "microbatch/memory/reclaim.h"
#include "microbatch/optim/optimizer.h"
#include "microbatch/runtime/spin_throttle.h"
#include "microbatch/step/gatherer.h"
#include "microbatch/step/reducer.h"
#include "microbatch/step/step_gate.h"

namespace microbatch {

struct AccumulatorOptions {
    Plan plan = {};                                              ///< how a batch is cut
    double clip_norm = std::numeric_limits<double>::infinity();  ///< largest norm of the mean gradient that is applied
    /// A weight's gradient is summed in the product that makes it: see InPlaceGradients. The same values to rounding,
    /// in less time and memory.
    bool sum_in_product = true;
    std::shared_ptr<Precision> precision = std::make_shared<FullPrecision>();
    std::shared_ptr<Reducer> reducer = std::make_shared<LocalReducer>();
};

/// What became of one batch.
struct StepReport {
    double loss = 0.0;               ///< mean over the batch's weight, at the parameters before the step
    double weight = 0.0;             ///< samples or target tokens, as the loss function counts
    double gradient_norm = 0.0;      ///< of the batch's mean gradient, before clipping
    double learning_rate = 0.0;      ///< at which the step was, or would have been, taken
    double update_seconds = 0.0;     ///< wall time of the optimizer's step, 0 if it was not taken
    std::int64_t micro_batches = 0;  ///< how many the batch was cut into
    Plan plan = {};                  ///< how it was run in the end; 0 as micro-batch if the caller cut it
    /// What the micro-batches say of the gradient's noise; none unless it was to be measured, and where nothing can be
    /// said: see measure_noise().
    std::optional<NoiseMeasure> noise = {};
    std::int64_t out_of_memory = 0;  ///< how many times it ran out of memory and was begun again
    bool applied = false;            ///< false: the parameters are as they were
    bool diverged = false;           ///< the gate says that skipping batches does not help
    std::string reason = {};         ///< why not applied; empty if it was
    /// The batch was left on the way, and nothing else is reported: give this to the next step() with the same batch.
    std::optional<PartialBatch> partial = {};
};

/// What step() and gather() do beside stepping.
struct StepOptions {
    StepGate* gate = nullptr;  ///< asked before FiniteGate, which is always asked
    /// Measures the gradient's noise from the micro-batches, where there are two or more: see StepReport::noise and
    /// MicroBatchGradientNorms. The update has the same bits. Memory: a copy of the gradients; where it runs out, the
    /// batch is begun again without.
    bool measure_noise = false;
    Reclaimers before_noise = {};              ///< what can give memory back before the noise measure is given up
    Reclaimers before_plan = {};               ///< and what can before the micro-batch is made smaller
    StopToken stop = {};                       ///< asked after every micro-batch but the last: see StepReport::partial
    std::optional<PartialBatch> partial = {};  ///< resume this batch where it was left
};

/// One optimizer step for a whole batch, however it is cut.
///
///     Accumulator accumulator(model, optimizer, {.plan = {.micro_batch = 8}, .clip_norm = 1.0});
///     for (const Batch& batch : batches) StepReport report = accumulator.step(batch, loss);
///
/// A loop that makes its own micro-batches streams them instead:
///
///     accumulator.begin();
///     for (...) accumulator.add({loss_sum, weight});
///     accumulator.finish();
///     accumulator.apply();
///
/// Out of memory: step() and gather() are transactions. A batch that runs out of memory is undone (gradients dropped,
///           generators and the model's buffers as before); then it is run again, with half the micro-batch for samples
///           of the shape that it failed at and larger ones, at 1 with recompute if the model offers it. The update is
///           bit for bit the one that the smaller plan alone would have made, of a loss function that keeps no state of
///           its own between calls, draws from torch's default generators and lets c10::OutOfMemoryError pass.
/// Formula:  g = (sum of the micro-batches' loss-sum gradients) / (sum of their weights), clipped once, one step.
/// Source:   reference: docs/how-it-works.md, section 1. Deviation: none.
/// State:    between gather (or finish) and apply everything about the batch is known and no parameter has changed.
/// Ownership: borrows the optimizer and a module, which must outlive this; shares the parameters' tensors.
/// Threads:  no two calls at the same time.
class Accumulator {
public:
    /// Errors: ErrorKind::usage if the optimizer updates a tensor that is not among the model's parameters (its
    /// gradients would never be cleared), clip_norm is not above 0, or as set_plan() and Gatherer's constructor.
    Accumulator(const AnyModel& model, Optimizer& optimizer, AccumulatorOptions options = {});

    /// Covers parameters that were added to the model; give them to the optimizer too.
    void track(const Parameters& parameters) { gatherer_.track(parameters); }

    /// gather(), then apply(), or discard() if a gate refuses. If it throws before the optimizer steps, everything is
    /// as before the step: no gradient is left, and parameters, buffers and generators are unchanged.
    /// Errors: as gather(); ErrorKind::does_not_fit if the optimizer's step itself runs out of memory twice.
    StepReport step(const BatchSource& batch, const LossFunction& loss, StepOptions options = {});
    StepReport step(const Batch& batch, const LossFunction& loss, StepOptions options = {}) {
        return step(TensorBatch(batch), loss, std::move(options));
    }

    /// All gradients of the batch, no update yet; or the batch as far as it came, if it was stopped. No gate is asked.
    /// Errors: see Gatherer::gather(); ErrorKind::does_not_fit if the batch runs out of memory whatever the plan.
    /// Whatever is thrown, everything is as before the call.
    std::variant<Gathered, PartialBatch> gather(const BatchSource& batch, const LossFunction& loss,
                                                StepOptions options);
    const Gathered& gather(const Batch& batch, const LossFunction& loss);

    void begin(bool measure_noise = false);  ///< see Gatherer::begin()
    void add(const WeightedLoss& loss);      ///< see Gatherer::add()
    const Gathered& finish();                ///< see Gatherer::finish()

    /// Divides by the weight, clips, steps, clears. Steps whatever the gradients are, NaN included; only weight 0,
    /// where there is nothing to divide by, is reported as not applied. Errors: ErrorKind::usage if nothing is
    /// gathered. If the optimizer throws, the gradients are cleared and the parameters are as it left them.
    StepReport apply();

    /// Drops what is gathered, without an update; the report says why. Allowed at any time. The model's buffers are as
    /// before gather(); generators go on.
    StepReport discard(std::string_view reason);

    /// Leaves the batch's mean gradient in .grad, without a copy, for an optimizer of your own: what is gathered is no
    /// longer known here, and .grad is to be cleared before the next batch. Of a batch of weight 0 there are no gradients.
    /// Errors: ErrorKind::usage if nothing is gathered.
    StepReport hand_over();

    /// Does to memory and time what apply() would do, and leaves parameters and optimizer as they are; what is gathered
    /// is lost. The optimizer keeps the state of the dry run until its end_dry_run(). Errors: as apply().
    void dry_run_apply();

    /// How batches are run from now on; what was learned from running out of memory is forgotten.
    /// Errors: ErrorKind::usage if the micro-batch is below 1, or recompute is asked of a model that does not offer it.
    void set_plan(const Plan& plan);
    const Plan& plan() const { return options_.plan; }

    /// What was learned from running out of memory: part of a run's state.
    MicroBatchCaps& caps() { return caps_; }
    const MicroBatchCaps& caps() const { return caps_; }

    /// Throws ErrorKind::usage if a batch is open, or gathered and neither applied nor discarded.
    void require_idle() const { gatherer_.require_idle(); }

    Model& model() const { return *model_; }
    Optimizer& optimizer() const { return optimizer_; }
    const Parameters& parameters() const { return gatherer_.parameters(); }

private:
    struct Attempt;

    void refuse_unknown_parameters();
    std::variant<Gathered, PartialBatch> gather_batch(const BatchSource& batch, const LossFunction& loss,
                                                      StepOptions& options);
    Attempt first_attempt(const BatchSource& batch, StepOptions& options) const;
    std::variant<Gathered, PartialBatch> try_gather(const BatchSource& batch, const LossFunction& loss,
                                                    const StopToken& stop, Attempt& attempt);
    bool make_plan_smaller(Attempt& attempt) const;
    void drop_gathered();
    void undo();
    double divisor() const;
    StepReport report() const;

    std::shared_ptr<Model> model_;
    SpinThrottle throttle_;
    Gatherer gatherer_;
    Optimizer& optimizer_;
    AccumulatorOptions options_;
    std::vector<at::Tensor> known_;  // what the optimizer updated when it was last checked
    MicroBatchCaps caps_;
    std::optional<StateDict> before_;   // the model before the batch that is gathered
    std::optional<Gathered> gathered_;  // and neither applied nor discarded
    std::int64_t out_of_memory_ = 0;    // in that batch
};

}  // namespace microbatch
