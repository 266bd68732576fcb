#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <optional>
#include <vector>

#include "microbatch/autograd/in_place_gradients.h"
#include "microbatch/core/batch_plan.h"
#include "microbatch/core/noise_scale.h"
#include "microbatch/model/parameters.h"
#include "microbatch/step/micro_batch_norms.h"
#include "microbatch/step/weighted_loss.h"

namespace microbatch {

/// What is known of a batch once all its gradients are gathered and before anything is updated.
struct Gathered {
    double loss_sum = 0.0;       ///< sum of the loss over the batch
    double weight = 0.0;         ///< W, what the loss is averaged over
    double gradient_norm = 0.0;  ///< Euclidean norm of the mean gradient, before clipping; 0 if W is 0
    std::int64_t micro_batches = 0;
    NoiseSums parts = {};  ///< of those with weight, where they were to be measured

    /// Mean loss of the batch; 0 if the weight is 0.
    double loss() const { return weight > 0.0 ? loss_sum / weight : 0.0; }
};

/// A batch that was left between two of its micro-batches.
struct OpenGather {
    std::int64_t samples = 0;  ///< the first so many of the batch are in
    Gathered so_far = {};      ///< without the gradient norm
    bool measure_parts = false;
    std::vector<at::Tensor> gradients = {};  ///< the sums so far, one for each parameter; undefined for none
};

/// Sums the gradients of one batch, micro-batch by micro-batch, in the parameters' .grad.
///
/// Formula:  .grad = sum over micro-batches of the gradient of the summed loss; the mean gradient of the batch is
///           .grad / W with W the sum of all weights.
/// Cost:     a weight's gradient is summed in the product that makes it, with no temporary: see InPlaceGradients, which
///           is on in the window, for the thread that called begin().
/// State:    a window is open from begin() to finish(); the gradients stay from finish() to clear().
/// Errors:   what add(), finish() or the loss function given to gather() throws closes the window and clears the
///           gradients: as if begin() had not been called. A call out of turn throws and changes nothing.
/// Threads:  no two calls at the same time.
class Gatherer {
public:
    /// Takes each tensor once; frozen parameters may be among them and may be thawed later. `sum_in_product` false
    /// leaves every gradient to autograd.
    /// Errors: ErrorKind::usage if a parameter is bfloat16 or half: sums of gradients stall in them.
    explicit Gatherer(const Parameters& parameters, bool sum_in_product = true);

    /// Covers more parameters, such as a head added to the model. Those that are known already are passed over.
    /// Errors: ErrorKind::usage as in the constructor, or if a window is open.
    void track(const Parameters& parameters);

    /// Opens a window. With `measure_parts` the gradient of every micro-batch is measured by itself: see
    /// MicroBatchGradientNorms. What is gathered has the same bits. Errors: ErrorKind::usage if a window is open, the
    /// gradients gathered last were neither used nor cleared, or a parameter holds a gradient that somebody else left;
    /// it is named. A .grad of zeros is dropped without a word.
    void begin(bool measure_parts = false);

    /// Throws ErrorKind::usage if a window is open, or gradients were gathered and neither used nor cleared.
    void require_idle() const;

    /// Adds the gradients of one micro-batch: backward of the sum, then the graph is freed. A micro-batch of weight 0
    /// adds nothing and its loss is not looked at, so that a 0/0 in it does no harm.
    /// Errors: ErrorKind::usage if no window is open, the loss is not valid (see validate), it depends on nothing that
    /// requires a gradient, or the sum of the weights is not finite.
    void add(const WeightedLoss& loss);

    /// Closes the window and says what was gathered. With weight 0 there are no gradients.
    /// Errors: ErrorKind::usage if no window is open, or the batch has weight but no parameter got a gradient.
    Gathered finish();

    /// begin(), add() for every micro-batch of the plan, finish(). Slices are views of the batch.
    /// Errors: as those; ErrorKind::usage if the batch is empty.
    Gathered gather(const Batch& batch, const Plan& plan, const LossFunction& loss, bool measure_parts = false);

    /// begin() for the micro-batches of a batch. Errors: as begin(); ErrorKind::usage if the batch is empty or the
    /// micro-batch below 1.
    void begin_on(const Batch& batch, const Plan& plan, bool measure_parts = false);

    /// Adds the micro-batches of `batch` from the sample that add_all() came to last, in an open window. `pause` is
    /// asked after each but the last: true leaves the window there, until add_all() is called again with the same
    /// batch. Returns true if the whole batch is in. Errors: as gather().
    bool add_all(const Batch& batch, const Plan& plan, const LossFunction& loss, const std::function<bool()>& pause);

    /// What an open window holds: the parameters' own gradients. Errors: ErrorKind::usage if no window is open.
    OpenGather open() const;

    /// Opens a window that holds what another one of such parameters held. The gradients are taken as they are, not
    /// copied.
    /// Errors: as begin(); ErrorKind::usage if they are not those of such parameters; no window is open then.
    void go_on(const OpenGather& open);

    /// Samples that add_all() has added to the window.
    std::int64_t samples() const { return samples_; }

    /// Drops all gradients and closes the window; allowed at any time.
    void clear();

    /// The gathered sums, of the parameters that have one.
    std::vector<at::Tensor> gradients() const;

    const Parameters& parameters() const { return parameters_; }

private:
    enum class State { idle, open, gathered };

    void refuse_stale_gradients();
    void add_checked(const WeightedLoss& loss);
    void measure();

    Parameters parameters_;
    bool sum_in_product_;
    std::optional<InPlaceGradients> in_place_;      // while a window is open
    std::optional<MicroBatchGradientNorms> parts_;  // the same, where they are measured
    State state_ = State::idle;
    std::int64_t samples_ = 0;
    at::Tensor loss_sum_;  // fp64 on the loss's device, so that no micro-batch waits for the device
    Gathered gathered_;
};

}  // namespace microbatch
