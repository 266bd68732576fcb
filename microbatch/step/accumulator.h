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
    Plan plan = {};                                              ///< how a batch is split
    double clip_norm = std::numeric_limits<double>::infinity();  ///< the largest norm of the applied mean gradient
    /// Accumulates weight gradients inside the GEMM: see InPlaceGradients. The same values up to rounding, in less time
    /// and memory.
    bool sum_in_product = true;
    std::shared_ptr<Precision> precision = std::make_shared<FullPrecision>();
    std::shared_ptr<Reducer> reducer = std::make_shared<LocalReducer>();
    bool shard_optimizer = false;  ///< see Accumulator::shard_optimizer()
    /// Above 0: the update has the same bits for any micro-batch and any number of processes. The batch is gathered in
    /// grains of so many samples, instead of micro-batches: see Invariance.
    std::int64_t grain = 0;
};

/// The result of one batch.
struct StepReport {
    double loss = 0.0;               ///< mean over the batch's weight, at the parameters before the step
    double weight = 0.0;             ///< samples or target tokens, as the loss function counts
    double gradient_norm = 0.0;      ///< of the batch's mean gradient, before clipping
    double learning_rate = 0.0;      ///< of the step, even if it was not applied
    double update_seconds = 0.0;     ///< wall time of the optimizer's step, 0 if it was not applied
    std::int64_t micro_batches = 0;  ///< into which the batch was split
    Plan plan = {};                  ///< with which it was finally run; micro_batch is 0 if the caller split the batch
    /// The gradient noise of the micro-batches; empty if it was not measured or is undefined: see measure_noise().
    std::optional<NoiseMeasure> noise = {};
    std::int64_t out_of_memory = 0;  ///< how often it ran out of memory and was repeated
    bool applied = false;            ///< false: the parameters are unchanged
    bool diverged = false;           ///< the gate says that skipping batches does not help
    std::string reason = {};         ///< why it was not applied; empty if it was
    /// The batch was interrupted, and nothing else is reported: pass this to the next step() with the same batch.
    std::optional<PartialBatch> partial = {};
};

/// Options of step() and gather().
struct StepOptions {
    StepGate* gate = nullptr;  ///< asked before FiniteGate, which is always asked
    /// Measures the gradient noise if there are at least two micro-batches: see StepReport::noise and
    /// MicroBatchGradientNorms. The update has the same bits. Memory: a copy of the gradients; if it does not fit, the
    /// batch is repeated without it.
    bool measure_noise = false;
    Reclaimers before_noise = {};  ///< what can free memory before the noise measurement is dropped
    Reclaimers before_plan = {};   ///< what can free memory before the micro-batch is reduced
    StopToken stop = {};           ///< called after every micro-batch except the last: see StepReport::partial
    std::optional<PartialBatch> partial = {};  ///< resumes this batch
};

/// One optimizer step for a whole batch, however it is split.
///
///     Accumulator accumulator(model, optimizer, {.plan = {.micro_batch = 8}, .clip_norm = 1.0});
///     for (const Batch& batch : batches) StepReport report = accumulator.step(batch, loss);
///
/// A loop that forms its own micro-batches streams them instead:
///
///     accumulator.begin();
///     for (...) accumulator.add({loss_sum, weight});
///     accumulator.finish();
///     accumulator.apply();
///
/// Out of memory: step() and gather() are transactions. A batch that runs out of memory is undone (gradients dropped,
/// generators and the model's buffers restored). Then it runs again, with half the micro-batch for samples of the shape
/// that failed and larger ones; at a micro-batch of 1, with recompute if the model supports it. The update is bit for
/// bit that of the smaller plan, if the loss function keeps no state between calls, draws only from torch's default
/// generators and does not catch c10::OutOfMemoryError.
/// Formula:  g = (sum of the micro-batches' loss-sum gradients) / (sum of their weights), clipped once, one step.
/// Source:   reference: docs/how-it-works.md, section 2. Deviation: none.
/// Invariant: with a grain, the bits depend neither on the micro-batch nor on the processes, with the same threads in each.
///           A batch whose gradients exceed the last one's 64 times is gathered twice, and so is the first one. Refused:
///           BatchNorm that moves, and operators that give other bits each time, which are named.
/// State:    between gather (or finish) and apply, everything about the batch is known and no parameter has changed.
/// Processes: with a Reducer of several, all call step() at the same time, and each gathers its share of the batch; the
///           update is the whole batch's, and all take the same decisions. A batch is not left half-way then.
/// Ownership: borrows the optimizer and a module, which must outlive this; shares the parameters' tensors.
/// Threads:  no two calls at the same time.
class Accumulator {
public:
    /// Errors: ErrorKind::usage if the optimizer updates a tensor that is not a parameter of the model (its gradients
    ///         would never be cleared), clip_norm is not above 0, or as set_plan() and Gatherer's constructor.
    Accumulator(const AnyModel& model, Optimizer& optimizer, AccumulatorOptions options = {});

    /// Adds parameters that were added to the model; add them to the optimizer too.
    void track(const Parameters& parameters) { gatherer_.track(parameters); }

    /// Divides the optimizer's state among the processes (ZeRO-1): each updates its own parameters, and gives them to the
    /// others. The gathered sums are those of its own parameters then. A single process keeps the whole state. All
    /// processes, between two batches. `yes` = false ends it.
    /// Errors: ErrorKind::usage if the optimizer does not support it, or it is to end after the optimizer has made state.
    void shard_optimizer(bool yes = true);
    bool is_sharded() const { return reducer().divides(); }

    /// Throws ErrorKind::lost_rank if a process was lost during a sharded update: the parameters may be a mixture of before
    /// and after it.
    void require_whole_update() const;

    /// gather(), then apply(), or discard() if a gate refuses. If it throws before the optimizer steps, nothing has
    /// changed: no gradient remains, and parameters, buffers and generators are unchanged.
    /// Errors: as gather(); ErrorKind::does_not_fit if the optimizer's step itself runs out of memory twice.
    StepReport step(const BatchSource& batch, const LossFunction& loss, StepOptions options = {});
    StepReport step(const Batch& batch, const LossFunction& loss, StepOptions options = {}) {
        return step(TensorBatch(batch), loss, std::move(options));
    }

    /// Computes all gradients of the batch without updating; returns the partial batch if it was stopped. No gate is
    /// asked.
    /// Errors: see Gatherer::gather(); ErrorKind::does_not_fit if the batch runs out of memory with every plan. After
    ///         any exception, nothing has changed.
    std::variant<Gathered, PartialBatch> gather(const BatchSource& batch, const LossFunction& loss,
                                                StepOptions options);
    const Gathered& gather(const Batch& batch, const LossFunction& loss);

    void begin(bool measure_noise = false);  ///< see Gatherer::begin()
    void add(const WeightedLoss& loss);      ///< see Gatherer::add()
    const Gathered& finish();                ///< see Gatherer::finish()

    /// Divides by the weight, clips, steps, clears. Steps even if gradients are NaN; only weight 0, which leaves
    /// nothing to divide by, is reported as not applied. Errors: ErrorKind::usage if nothing is gathered. If the
    /// optimizer throws, the gradients are cleared and the parameters are as it left them.
    StepReport apply();

    /// Drops the gathered batch without an update; the report says why. Allowed at any time. Restores the model's
    /// buffers, but not the generators.
    StepReport discard(std::string_view reason);

    /// Leaves the batch's mean gradient in .grad, without a copy, for an optimizer of your own. Clear .grad before the
    /// next batch. With weight 0, there are no gradients. Errors: ErrorKind::usage if nothing is gathered, or the
    /// optimizer's state is sharded.
    StepReport hand_over();

    /// begin() with another plan, for planning.
    void begin_trial(const Plan& plan);

    /// gather() with another plan, once, for planning: if it runs out of memory, that error passes. `on_piece` as in
    /// GatherOptions.
    void gather_trial(const BatchSource& batch, const LossFunction& loss, const Plan& plan,
                      std::function<void(bool first, bool last)> on_piece);

    /// Uses memory and time like apply(), but leaves parameters and optimizer unchanged; the gathered batch is lost.
    /// The optimizer keeps the state of the dry run until end_dry_run(). Errors: as apply().
    void dry_run_apply();

    /// True if a plan with this policy may have recompute.
    bool offers_recompute(BatchNorm policy) const {
        return policy == BatchNorm::exact || model_->offers_checkpointing();
    }

    /// Sets the plan for later batches, and forgets the caps learned from out-of-memory errors.
    /// Errors: ErrorKind::usage if the micro-batch is below 1, or recompute is requested of a model that does not
    ///         support it.
    void set_plan(const Plan& plan);
    const Plan& plan() const { return options_.plan; }

    /// The largest gradients of the last batch that was applied, by parameter name: part of a run's state if there are grains.
    void save_ranges(const StateWriter& writer) const;
    Commit prepare_ranges(const StateReader& reader);
    std::int64_t grain() const { return options_.grain; }

    /// The caps learned from out-of-memory errors: part of a run's state.
    MicroBatchCaps& caps() { return caps_; }
    const MicroBatchCaps& caps() const { return caps_; }

    /// Throws ErrorKind::usage if the plan's BatchNorm policy is not one for several processes, or for grains.
    void require_policy(const Plan& plan) const;

    /// Throws ErrorKind::usage if a batch is open, or gathered but neither applied nor discarded.
    void require_idle() const { gatherer_.require_idle(); }

    Reducer& reducer() const { return *options_.reducer; }
    Model& model() const { return *model_; }
    Optimizer& optimizer() const { return optimizer_; }
    const Parameters& parameters() const { return gatherer_.parameters(); }

private:
    struct Attempt;
    struct OutOfRange;

    void refuse_unknown_parameters();
    std::string fragmentation() const;
    std::variant<Gathered, PartialBatch> gather_batch(const BatchSource& batch, const LossFunction& loss,
                                                      StepOptions& options);
    Attempt first_attempt(const BatchSource& batch, StepOptions& options) const;
    std::variant<Gathered, PartialBatch> try_gather(const BatchSource& batch, const LossFunction& loss,
                                                    const StopToken& stop, Attempt& attempt);
    std::variant<Gathered, PartialBatch> try_in_range(const BatchSource& batch, const LossFunction& loss,
                                                      const StopToken& stop, Attempt& attempt);
    void plan_grains(Attempt& attempt);
    void probe_grain(const BatchSource& share, const LossFunction& loss);
    void require_range(Attempt& attempt);
    void reserve_for_step();
    void agree(const std::exception_ptr& failure, Attempt& attempt);
    Reclaimers agreed(const Reclaimers& own, const Attempt& attempt);
    bool make_plan_smaller(Attempt& attempt) const;
    void open(bool measure_noise, const Plan& plan);
    void drop_gathered();
    void undo();
    double divisor() const;
    StepReport report() const;

    std::shared_ptr<Model> model_;
    SpinThrottle throttle_;
    Gatherer gatherer_;
    Optimizer& optimizer_;
    AccumulatorOptions options_;
    std::vector<at::Tensor> known_;  // of the optimizer, at the last check
    MicroBatchCaps caps_;
    GradientRanges ranges_;  // of the last batch that was applied, by parameter; empty if not known
    GradientRanges ranges_of_gathered_;
    bool is_probed_ = false;            // a grain was found to have the same bits each time
    std::optional<StateDict> before_;   // the model before the gathered batch
    std::optional<Gathered> gathered_;  // neither applied nor discarded
    std::int64_t out_of_memory_ = 0;    // in the gathered batch
    bool is_trial_ = false;             // the open batch, or the last one that was streamed
    bool is_sharing_ = false;           // an update, or lost a process while it did
};

}  // namespace microbatch
