#pragma once

#include <span>

#include "microbatch/data/dataset.h"
#include "microbatch/step/weighted_loss.h"

namespace microbatch {

/// A batch of the numbers of its samples in a dataset, 8 bytes each: goes with a loss function of loss_on(), which
/// fetches the samples of a micro-batch when its turn comes. So the batch itself is never held whole.
Batch lazy_batch(std::span<const std::int64_t> indices);

/// `loss` on the samples of `dataset` whose numbers a micro-batch of a lazy_batch() holds.
/// Ownership: borrows the dataset, which must outlive the function.
LossFunction loss_on(const Dataset& dataset, LossFunction loss);

/// A batch to plan with: the dataset's sample that takes the most memory, `samples` times.
/// Errors: ErrorKind::usage if `samples` is below 1.
Batch longest_lazy_batch(const Dataset& dataset, std::int64_t samples);
Batch longest_batch(const Dataset& dataset, std::int64_t samples);

}  // namespace microbatch
