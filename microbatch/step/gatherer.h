#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <variant>
#include <vector>

#include "microbatch/data/batch_source.h"
#include "microbatch/model/model.h"
#include "microbatch/step/gathered.h"
#include "microbatch/step/loss.h"
#include "microbatch/step/micro_batch_caps.h"
#include "microbatch/step/micro_batch_norms.h"
#include "microbatch/step/micro_batch_scope.h"
#include "microbatch/step/precision.h"

namespace microbatch {

/// Asked between micro-batches: true leaves the batch there.
using StopToken = std::function<bool()>;

/// How gather() runs a batch.
struct GatherOptions {
    Plan plan = {};
    bool measure_noise = false;            ///< of the micro-batches' gradients: see MicroBatchGradientNorms
    StopToken stop = {};                   ///< asked after every micro-batch but the last
    const MicroBatchCaps* caps = nullptr;  ///< smaller plans that samples of some shapes need
    /// Told the shape of a micro-batch before its loss is computed.
    std::function<void(const SampleShape&, const Plan&)> on_micro_batch = {};
};

/// Sums the gradients of one batch, micro-batch by micro-batch, in the parameters' .grad.
///
/// Formula:  .grad = sum over micro-batches of the gradient of the summed loss; the mean gradient of the batch is
///           .grad / W with W the sum of all weights.
/// State:    a window is open from begin() to finish(); the sums stay in .grad until clear().
/// Errors:   what add(), finish() or the loss function given to gather() throws closes the window and clears the
///           gradients: as if begin() had not been called. A call out of turn throws and changes nothing.
/// Threads:  no two calls at the same time.
class Gatherer {
public:
    /// Takes the model's parameters; frozen ones may be unfrozen later.
    /// Errors: ErrorKind::usage if the precision does not support a parameter.
    explicit Gatherer(const AnyModel& model, bool sum_in_product = true,
                      std::shared_ptr<Precision> precision = std::make_shared<FullPrecision>());

    /// Covers more parameters, such as a head added to the model; known ones are ignored.
    /// Errors: ErrorKind::usage as in the constructor, or if a window is open.
    void track(const Parameters& parameters);

    /// begin(), add() for every micro-batch, finish(); or a PartialBatch if it was stopped on the way, with the
    /// gradients moved out of .grad. With `partial` the batch is resumed where that was left.
    /// Errors: as those; ErrorKind::usage if the batch is empty, the micro-batch is below 1, or `partial` is of another
    ///         batch or of other parameters.
    std::variant<Gathered, PartialBatch> gather(const BatchSource& source, const LossFunction& loss,
                                                const GatherOptions& options, std::optional<PartialBatch> partial = {});
    Gathered gather(const Batch& batch, const Plan& plan, const LossFunction& loss, bool measure_noise = false);

    /// Opens a window for micro-batches run by this plan. Errors: ErrorKind::usage if one is open, the gradients
    /// gathered last were neither used nor cleared, or a parameter holds a gradient that somebody else left; it is
    /// named. A .grad of zeros is dropped.
    void begin(bool measure_noise = false, const Plan& plan = {});

    /// Throws ErrorKind::usage if the partial batch is of another batch or of other parameters.
    void require_partial(const BatchSource& source, const PartialBatch& partial) const;

    /// Throws ErrorKind::usage if a window is open, or gradients were gathered and neither used nor cleared.
    void require_idle() const;

    /// Adds the gradients of one micro-batch: backward of the sum, then the graph is freed. A micro-batch of weight 0
    /// adds nothing and its loss is ignored, so that a 0/0 in it does no harm.
    /// Errors: ErrorKind::usage if no window is open, the loss is not valid (see validate), it depends on nothing that
    /// requires a gradient, a gradient is sparse, the sum of the weights is not finite, or somebody else changed a
    /// .grad meanwhile.
    void add(const WeightedLoss& loss);

    /// Closes the window and says what was gathered. With weight 0 there are no gradients.
    /// Errors: ErrorKind::usage if no window is open, the batch has weight but no parameter got a gradient, or somebody
    /// else changed a .grad since the last add().
    Gathered finish();

    /// Divides what was gathered in place, for who steps by himself: .grad is his from now on, and must be cleared
    /// before the next batch. Requires: finish(), and nothing cleared since.
    void hand_over(std::span<const GradientView> sums, double divisor);

    /// Drops all gradients and closes the window; allowed at any time.
    void clear();

    const Parameters& parameters() const { return parameters_; }
    Precision& precision() const { return *precision_; }

private:
    enum class State { idle, open, gathered };
    /// A .grad as we left it. The reference is weak: it keeps the address from being used again, not the memory.
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
    std::int64_t add_next(const BatchSource& source, std::int64_t begin, const LossFunction& loss,
                          const GatherOptions& options);
    void resume(const BatchSource& source, PartialBatch& partial, const Plan& plan);
    PartialBatch leave(const BatchSource& source, std::int64_t samples, bool measure_noise);
    void enter(const Plan& plan);
    void measure();

    std::shared_ptr<Model> model_;
    Parameters parameters_;
    std::shared_ptr<Precision> precision_;
    MicroBatchScopes scopes_;
    std::optional<MicroBatchGradientNorms> norms_;  // while a window is open, where they are measured
    State state_ = State::idle;
    std::vector<Mark> marks_;  // one for each parameter
    at::Tensor loss_sum_;      // fp64 on the loss's device, so that no micro-batch waits for the device
    Gathered gathered_;
};

}  // namespace microbatch
