#pragma once

#include <ATen/core/Tensor.h>

#include <functional>

#include "microbatch/data/batch.h"

namespace microbatch {

/// What a loss function returns for a micro-batch: the differentiable SUM of the loss, and the loss denominator.
struct WeightedLoss {
    at::Tensor sum;  ///< one element, any floating dtype
    double weight =
        0.0;  ///< samples or target tokens, the same kind for the whole run; may be fractional; finite, at least 0
};

/// Throws ErrorKind::usage unless the weight is finite and at least 0 and, with a weight above 0, the sum is one real
/// element. With weight 0 the sum is ignored.
void validate(const WeightedLoss& loss);

/// The user's loss: takes a micro-batch, returns its summed loss and weight. Called once per micro-batch, in order.
using LossFunction = std::function<WeightedLoss(const Batch&)>;

/// Calls the loss function. Errors: TooFewSamples instead of torch's own error if BatchNorm has a single value per
/// channel; all other exceptions of the function pass through.
WeightedLoss loss_of(const LossFunction& loss, const Batch& micro);

}  // namespace microbatch
