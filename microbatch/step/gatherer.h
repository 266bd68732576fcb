#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <variant>
#include <vector>

#include "microbatch/core/keep.h"
#include "microbatch/data/batch_source.h"
#include "microbatch/model/model.h"
#include "microbatch/step/batch_totals.h"
#include "microbatch/step/gathered.h"
#include "microbatch/step/loss.h"
#include "microbatch/step/micro_batch_caps.h"
#include "microbatch/step/micro_batch_norms.h"
#include "microbatch/step/micro_batch_scope.h"
#include "microbatch/step/order_free_sums.h"
#include "microbatch/step/precision.h"
#include "microbatch/step/reducer.h"

namespace microbatch {

class BatchNormLayers;

/// Called between micro-batches: true interrupts the batch.
using StopToken = std::function<bool()>;

/// How a batch is gathered so that its bits depend neither on the micro-batches nor on the processes: grain by grain, each
/// at its own shape and with random numbers of its own, and summed in any order.
struct Invariance {
    std::int64_t grain = 1;      ///< samples, but for the batch's last one
    std::int64_t first = 0;      ///< number in the whole batch of this process's first grain
    std::int64_t grains = 1;     ///< in the whole batch
    std::uint64_t seed = 0;      ///< of the batch's random numbers
    GradientRanges ranges = {};  ///< see OrderFreeSums
    GradientRanges found = {};   ///< set when all grains have been added, before on_added
};

/// Options of gather().
struct GatherOptions {
    Plan plan = {};
    bool measure_noise = false;            ///< of the micro-batches' gradients: see MicroBatchGradientNorms
    StopToken stop = {};                   ///< called after every micro-batch except the last
    const MicroBatchCaps* caps = nullptr;  ///< smaller plans that samples of some shapes need
    /// Called with the shape of a micro-batch before its loss is computed.
    std::function<void(const SampleShape&, const Plan&)> on_micro_batch = {};
    /// Of a batch with exact BatchNorm: called after each piece of work, which is one micro-batch between two layers,
    /// forward or backward. Says whether it was the first micro-batch's, and the last one's.
    std::function<void(bool first, bool last)> on_piece = {};
    /// Called when every micro-batch has been added, before the batch is closed.
    std::function<void()> on_added = {};
    /// Combines the batch with those of other processes; null: it is the whole batch.
    Reducer* reducer = nullptr;
    /// Gathers in grains instead of micro-batches. Noise is not measured then, and the batch is not stopped.
    Invariance* invariance = nullptr;
};

/// Sums the gradients of one batch, micro-batch by micro-batch, in the parameters' .grad.
///
/// Formula:  .grad = sum over micro-batches of the gradient of the summed loss; the mean gradient of the batch is
///           .grad / W with W the sum of all weights.
/// State:    a batch is open from begin() to finish(); the sums stay in .grad until clear().
/// Errors:   if add(), finish() or the loss function throws, the batch is closed and the gradients are cleared, as if
///           begin() had not been called. A call in the wrong order throws and changes nothing.
/// Threads:  no two calls at the same time.
class Gatherer {
public:
    /// Covers the model's parameters; frozen ones may be unfrozen later.
    /// Errors: ErrorKind::usage if the precision does not support a parameter.
    explicit Gatherer(const AnyModel& model, bool sum_in_product = true,
                      std::shared_ptr<Precision> precision = std::make_shared<FullPrecision>());
    Gatherer(Gatherer&&) noexcept;
    ~Gatherer();

    /// Covers more parameters, such as a head added to the model; known ones are ignored.
    /// Errors: ErrorKind::usage as in the constructor, or if a batch is open.
    void track(const Parameters& parameters);

    /// begin(), add() for every micro-batch, finish(); or returns a PartialBatch if it was stopped, with the gradients
    /// moved out of .grad. With `partial`, resumes that batch. With exact BatchNorm, a batch that is cut is not
    /// stopped, and its noise is not measured: no micro-batch has a gradient of its own.
    /// Errors: as those; ErrorKind::usage if the batch is empty, the micro-batch is below 1, or `partial` belongs to
    ///         another batch or to other parameters.
    std::variant<Gathered, PartialBatch> gather(const BatchSource& source, const LossFunction& loss,
                                                const GatherOptions& options, std::optional<PartialBatch> partial = {});
    Gathered gather(const Batch& batch, const Plan& plan, const LossFunction& loss, bool measure_noise = false);

    /// Opens a batch for micro-batches run with this plan. A .grad of zeros is dropped.
    /// Errors: ErrorKind::usage if a batch is open, the last gathered gradients were neither used nor cleared, or other
    ///         code left a gradient in a parameter, which is named.
    void begin(bool measure_noise = false, const Plan& plan = {});

    /// The open batch is summed in whatever order: see OrderFreeSums. Requires: begin() was just called.
    void sum_in_any_order(const GradientRanges& ranges, std::int64_t summands);

    /// Throws ErrorKind::usage if the partial batch belongs to another batch or to other parameters.
    void require_partial(const BatchSource& source, const PartialBatch& partial) const;

    /// Throws ErrorKind::usage if a batch is open, or gradients were gathered and neither used nor cleared.
    void require_idle() const;

    /// Adds the gradients of one micro-batch: runs backward from the sum, then frees the graph. A micro-batch of weight
    /// 0 adds nothing and its loss is ignored, so a 0/0 in it is harmless.
    /// Errors: ErrorKind::usage if no batch is open, the loss is not valid (see validate) or depends on nothing that
    ///         requires a gradient, a gradient is sparse, the sum of the weights is not finite, other code changed a
    ///         .grad in the meantime, or it is the second micro-batch of a plan with exact BatchNorm, which needs all of
    ///         them at once.
    void add(const WeightedLoss& loss);

    /// Closes the batch and returns what was gathered, by all processes of the reducer if there is one. With weight 0,
    /// there are no gradients.
    /// Errors: ErrorKind::usage if no batch is open, the batch has weight but no parameter received a gradient, or
    ///         other code changed a .grad since the last add().
    Gathered finish(Reducer* reducer = nullptr);

    /// Divides the gathered sums in place and leaves them in .grad, which belongs to the caller from now on. Requires:
    /// finish() was called, and nothing was cleared since.
    void hand_over(std::span<const GradientView> sums, double divisor);

    /// Drops all gradients and closes the batch; allowed at any time.
    void clear();

    const Parameters& parameters() const { return parameters_; }

    /// The parameters that have a gradient so far, with tensors like the gradients.
    GradientViews gradients_to_come() const;
    Precision& precision() const { return *precision_; }

private:
    enum class State { idle, open, gathered };
    /// A .grad as we left it. The weak reference keeps its address from being reused, but does not keep the memory.
    struct Mark {
        c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl> gradient;
        std::uint32_t version = 0;

        explicit Mark(const at::Tensor& of);
        bool holds(const at::Tensor& now) const;
    };

    void refuse_stale_gradients();
    void refuse_changed_gradients() const;
    void refuse_sparse_gradients() const;
    void mark_gradients();
    void add_checked(const WeightedLoss& loss);
    /// A micro-batch that is ready to run.
    struct Next {
        Batch batch;
        std::int64_t end = 0;
    };
    Next load_next(const BatchSource& source, std::int64_t begin, const GatherOptions& options);
    std::int64_t add_next(const BatchSource& source, std::int64_t begin, const LossFunction& loss,
                          const GatherOptions& options);
    Gathered gather_exactly(const BatchSource& source, const LossFunction& loss, const GatherOptions& options);
    void count(const WeightedLoss& loss);
    void resume(const BatchSource& source, PartialBatch& partial, const Plan& plan);
    PartialBatch leave(const BatchSource& source, std::int64_t samples, bool measure_noise);
    void enter(const Plan& plan);
    Gathered gather_grains(const BatchSource& source, const LossFunction& loss, const GatherOptions& options);
    void measure(Reducer* reducer);
    void place(GradientViews& sums);
    void read_totals();
    void drop_gradients();

    std::shared_ptr<Model> model_;
    Parameters parameters_;
    std::shared_ptr<Precision> precision_;
    MicroBatchScopes scopes_;
    std::unique_ptr<BatchNormLayers> layers_;       // while a batch is open, if their policy needs it
    std::optional<KeepPlans> keep_plans_;           // for exact batches, once learned
    std::optional<MicroBatchGradientNorms> norms_;  // while a batch is open, if they are measured
    std::optional<OrderFreeSums> sums_;             // while a batch is open, if it is summed in whatever order
    State state_ = State::idle;
    std::vector<Mark> marks_;  // one per parameter
    BatchTotals totals_;
    Gathered gathered_;
};

}  // namespace microbatch
