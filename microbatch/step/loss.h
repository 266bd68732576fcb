#pragma once

#include <ATen/core/Tensor.h>

#include <functional>

#include "microbatch/data/batch.h"

namespace microbatch {

/// What the sum of a loss is averaged over: a number, or a tensor of one element that stays on its device. Such a one is
/// read once, when the batch is complete, so that no micro-batch waits for the device. Where it is 0, the sum is not
/// ignored: it must be 0 too, or have no gradient.
class Weight {
public:
    Weight(double value = 0.0) : value_(value) {}  // NOLINT: {sum, 8.0}
    /// One on the CPU is read at once. Errors: ErrorKind::usage unless it has one element and is real.
    Weight(const at::Tensor& of);  // NOLINT: {sum, mask.sum()}

    /// The tensor, fp64 without dimensions; undefined if the value is known.
    const at::Tensor& on_device() const { return on_device_; }
    bool is_known() const { return !on_device_.defined(); }
    bool is_known_zero() const { return is_known() && value_ == 0.0; }

    /// Waits for the device if the value is not known.
    double value() const;

private:
    double value_ = 0.0;
    at::Tensor on_device_;
};

/// What a loss function returns for a micro-batch: the differentiable SUM of the loss, and the loss denominator.
struct WeightedLoss {
    at::Tensor sum;  ///< one element, any floating dtype
    /// Samples or target tokens, the same kind for the whole run; may be fractional; finite, at least 0.
    Weight weight = {};
};

/// Throws ErrorKind::usage unless it is finite and at least 0.
void require_weight(double weight);

/// Throws ErrorKind::usage unless the weight, if it is known, is finite and at least 0 and, with a weight above 0, the sum
/// is one real element. With a weight known to be 0 the sum is ignored.
void validate(const WeightedLoss& loss);

/// The value of the weight, validated with its loss. Waits for the device if the value is not known. Errors: as validate()
/// and require_weight().
double weight_of(const WeightedLoss& loss);

/// The user's loss: takes a micro-batch, returns its summed loss and weight. Called once per micro-batch, in order.
using LossFunction = std::function<WeightedLoss(const Batch&)>;

/// The loss of micro-batches that come from the host: they are copied to the device first, while it computes the one
/// before (see Uploader); on the CPU it is the function as it is. Each copy of the function shares the uploader: no two calls at the same time.
LossFunction on_device(LossFunction loss, at::Device device);

/// Calls the loss function. Errors: TooFewSamples instead of torch's own error if BatchNorm has a single value per
/// channel; all other exceptions of the function pass through.
WeightedLoss loss_of(const LossFunction& loss, const Batch& micro);

}  // namespace microbatch
