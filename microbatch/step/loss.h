#pragma once

#include <ATen/core/Tensor.h>

#include <functional>

#include "microbatch/data/batch.h"

namespace microbatch {

/// What a loss function returns for a micro-batch: the differentiable SUM of the loss over it, and what the sum is
/// averaged over.
struct WeightedLoss {
    at::Tensor sum;       ///< one element, any floating dtype
    double weight = 0.0;  ///< samples or target tokens, one kind a run; fractions are allowed; finite, at least 0
};

/// Throws ErrorKind::usage unless the weight is finite and at least 0 and, with a weight above 0, the sum is one real
/// element. With weight 0 the sum is ignored.
void validate(const WeightedLoss& loss);

/// The user's loss: a micro-batch in, its summed loss and weight out. Called once a micro-batch, in order.
using LossFunction = std::function<WeightedLoss(const Batch&)>;

/// Calls the loss function. Errors: TooFewSamples in place of torch's own where BatchNorm is left with a single value
/// per channel; anything else that the function throws passes through.
WeightedLoss loss_of(const LossFunction& loss, const Batch& micro);

}  // namespace microbatch
