#pragma once

#include <functional>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "microbatch/model/model_state.h"
#include "microbatch/optim/optimizer.h"
#include "microbatch/runtime/spin_throttle.h"
#include "microbatch/step/gatherer.h"
#include "microbatch/step/micro_batch_caps.h"

namespace microbatch {

class Recomputable;

struct AccumulatorOptions {
    Plan plan = {};                                              ///< how a batch is cut
    double clip_norm = std::numeric_limits<double>::infinity();  ///< largest norm of the mean gradient that is applied
    /// The model that the loss function uses, borrowed: its buffers are put back when a step is undone, and its blocks
    /// recompute where the plan says so. Without one neither happens.
    torch::nn::Module* model = nullptr;
    /// A weight's gradient is summed in the product that makes it: see InPlaceGradients. The same values to rounding,
    /// in less time and memory.
    bool sum_in_product = true;
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
    std::int64_t out_of_memory = 0;  ///< how many times it ran out of memory and was begun again, with a smaller plan
    bool applied = false;            ///< false: the parameters are as they were
    bool paused = false;             ///< the batch is not all in yet, and stays open: nothing else is reported
    std::string reason = {};         ///< why not applied; empty if it was
};

/// Why a batch should not be applied: "zero weight", "loss is not finite" or "gradient norm is not finite"; empty if
/// nothing speaks against it.
std::string_view reason_to_refuse(const Gathered& gathered);

/// Decides between gather and apply: why this batch is not to be applied, or empty. Called once for every batch that
/// has weight, before it is seen whether there is a reason_to_refuse().
using Judge = std::function<std::string(const Gathered&)>;

/// What step() does beside stepping.
struct StepOptions {
    Judge judge = {};
    /// Measures the gradient's noise from the micro-batches, where there are two or more: see StepReport::noise and
    /// MicroBatchGradientNorms. The update has the same bits. Memory: a copy of the gradients; where it runs out, the
    /// batch is begun again without.
    bool measure_noise = false;
    /// Asked where memory has run out, before all else: true if some that was lent has come back, and the batch is
    /// worth another try as it was.
    std::function<bool()> release_memory = {};
    /// The same, asked before the plan is made smaller, for what is given up for good.
    std::function<bool()> give_up_memory = {};
    /// Asked after every micro-batch but the last: true leaves the batch open there. Called again with the same batch,
    /// step() goes on with the next micro-batch, to the same bits.
    std::function<bool()> pause = {};
};

/// A batch that was left open, to be gone on with by this accumulator or, written down, by another one made alike.
struct OpenBatch {
    OpenGather gathered;
    Plan plan;
    std::int64_t out_of_memory = 0;
    HeldState before;  ///< the model's buffers and the generators before the batch
};

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
/// Out of memory: step() and gather() are transactions. A batch that runs out of memory (c10::OutOfMemoryError) is
/// undone:
///           gradients dropped, generators and the model's buffers as before; then it is run again with half the
///           micro-batch, at 1 with recompute if the model offers it. The update is bit for bit the one that the
///           smaller plan alone would have made, of a loss function that keeps no state of its own between calls, draws
///           from torch's default generators and lets c10::OutOfMemoryError pass. The smaller plan is kept for samples
///           of this shape and larger ones.
///
/// Formula:  g = (sum of the micro-batches' loss-sum gradients) / (sum of their weights), clipped once, one step.
/// Source:   reference: docs/how-it-works.md, section 1. Deviation: none.
/// State:    between gather (or finish) and apply everything about the batch is known and no parameter has changed.
/// Ownership: borrows the optimizer, which must outlive this; shares the parameters' tensors.
/// Pause:    a batch can be left between two micro-batches, see StepOptions::pause; open_batch() is its state.
/// Threads:  no two calls at the same time.
class Accumulator {
public:
    /// Errors: ErrorKind::usage if the optimizer updates a tensor that is not among the parameters (its gradients would
    /// never be cleared), clip_norm is not above 0, or as set_plan() and Gatherer's constructor.
    Accumulator(const Parameters& parameters, Optimizer& optimizer, AccumulatorOptions options = {});

    /// Covers parameters that were added to the model; give them to the optimizer too.
    void track(const Parameters& parameters) { gatherer_.track(parameters); }

    /// gather(), then apply(), or discard() if the judge or reason_to_refuse() has a reason. If it throws
    /// before the optimizer steps, everything is as before the step: no gradient is left, and parameters, buffers and
    /// generators are unchanged.
    /// Errors: as gather(); ErrorKind::does_not_fit if the optimizer's step itself runs out of memory twice.
    StepReport step(const Batch& batch, const LossFunction& loss, const StepOptions& options = {});

    /// All gradients of the batch, no update yet. Errors: see Gatherer::gather(); ErrorKind::does_not_fit if the batch
    /// runs out of memory whatever the plan. Whatever is thrown, everything is as before the call.
    /// Of the options the judge is not asked.
    /// With a pause, see is_paused().
    Gathered gather(const Batch& batch, const LossFunction& loss, const StepOptions& options = {});

    /// True if a batch was left open by StepOptions::pause: the next step() or gather() goes on with it.
    bool is_paused() const { return paused_; }

    /// The batch that was left open, with the parameters' own gradients; none if there is none.
    std::optional<OpenBatch> open_batch() const;

    /// The next step() or gather() goes on with this batch, from the micro-batch that it was left at; if it runs out of
    /// memory it is begun anew from `before`. A plan that was set meanwhile holds for the rest. The gradients are taken
    /// as they are, not copied.
    /// Errors: ErrorKind::usage if it is not of such parameters and such a model, or a batch is open or gathered;
    ///         nothing has changed then.
    void go_on(const OpenBatch& open);

    void begin();                        ///< see Gatherer::begin()
    void add(const WeightedLoss& loss);  ///< see Gatherer::add()
    Gathered finish();                   ///< see Gatherer::finish()

    /// Divides by the weight, clips, steps, clears. Steps whatever the gradients are, NaN included; only weight 0,
    /// where there is nothing to divide by, is reported as not applied. Errors: ErrorKind::usage if nothing is
    /// gathered. If the optimizer throws, the gradients are cleared and the parameters are as it left them.
    StepReport apply();

    /// Drops what is gathered, without an update; the report says why. Allowed at any time. The model's buffers are as
    /// before gather(); generators go on.
    StepReport discard(std::string_view reason);

    /// Does to memory and time what apply() would do, and leaves parameters and optimizer as they are; what is gathered
    /// is lost. The optimizer keeps its rehearsed state until its end_dry_run(). Errors: as apply().
    void dry_run_apply();

    /// How batches are run from now on; what was learned from running out of memory is forgotten.
    /// Errors: ErrorKind::usage if the micro-batch is below 1, or recompute is asked of a model that does not offer it.
    void set_plan(const Plan& plan);
    const Plan& plan() const { return options_.plan; }

    /// What was learned from running out of memory, and to know it again.
    const std::vector<MicroBatchCap>& limits() const { return limits_.all(); }
    void restore_limits(std::vector<MicroBatchCap> limits) { limits_.restore(std::move(limits)); }

    /// The model, if there is one and it can recompute its blocks; null otherwise.
    Recomputable* recomputable() const;

    /// Throws ErrorKind::usage if a batch is open, or gathered and neither applied nor discarded.
    void require_idle() const { gatherer_.require_idle(); }

    Optimizer& optimizer() const { return optimizer_; }
    const Parameters& parameters() const { return gatherer_.parameters(); }
    torch::nn::Module* model() const { return options_.model; }

private:
    void refuse_unknown_parameters();
    std::string ask(const Judge& judge, const Gathered& gathered);
    [[noreturn]] void give_up(const std::string& why);
    void open(const Batch& batch, const StepOptions& options);
    bool make_room(const StepOptions& options);
    bool try_gather(const Batch& batch, const LossFunction& loss, const std::function<bool()>& pause);
    void hold_before();
    bool try_apply(StepReport& report);
    void undo();
    std::optional<Plan> smaller_plan() const;
    double divisor() const;
    StepReport report() const;

    SpinThrottle threads_;
    Gatherer gatherer_;
    Optimizer& optimizer_;
    AccumulatorOptions options_;
    std::vector<at::Tensor> known_;  // what the optimizer updated when it was last checked
    MicroBatchCaps limits_;
    Plan plan_;                         // of the batch that is gathered
    std::optional<ModelState> before_;  // the batch that is gathered
    std::int64_t out_of_memory_ = 0;    // in this step
    std::string out_of_memory_message_;
    bool measure_parts_ = false;  // in this batch
    bool paused_ = false;         // between two micro-batches of it
    Gathered gathered_;
    bool ready_ = false;  // gathered, and neither applied nor discarded
};

}  // namespace microbatch
