#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "microbatch/data/batch_source.h"
#include "microbatch/model/model.h"
#include "microbatch/step/loss.h"

namespace microbatch {

/// Why the gradient of a batch depends on how it is split.
enum class Cause {
    averaged_loss,     ///< the loss function returns a mean, or a weight that does not grow with the micro-batch
    batch_statistics,  ///< a layer such as BatchNorm normalises over the micro-batch
    randomness,       ///< dropout and similar draw different numbers for a different split; no bias, so mostly harmless
    coupled_samples,  ///< the loss mixes samples, such as in-batch negatives
    not_finite,       ///< the loss or a gradient is NaN or infinite
    unknown,
};

/// One line for people: the cause, and what to do about it.
std::string_view describe(Cause cause);

/// A parameter whose gradient changes when the batch is split.
struct Difference {
    std::string parameter;
    double relative = 0.0;  ///< |whole - split| / max(|whole|, |split|, floor), see verify()
};

struct Verification {
    double tolerance = 0.0;               ///< on Difference::relative
    double loss_difference = 0.0;         ///< |whole - split| / max(|whole|, |split|) of the mean losses
    std::vector<Difference> differences;  ///< only those above the tolerance, largest first
    std::vector<Cause> causes;            ///< likely ones, worst first; empty if nothing differs

    bool ok() const { return differences.empty() && causes.empty(); }
};

/// Compares the gradients of the whole `batch` with those of the same batch split into micro-batches of `micro_batch`
/// samples, on the user's own model, and reports which parameters differ and why.
///
/// With a BatchNorm policy, the split batch follows it: exact then agrees with the whole batch.
///
/// Any split reveals an averaged loss: with equal micro-batches, a mean of means does not show in the gradients, but
/// its weights do not add up. A dependence on other properties (such as the longest sample) shows if they differ within
/// the batch.
/// Tolerance: the square root of the dtype's epsilon: half of the digits. A different split changes only rounding,
///            which is thousands of times smaller; each known mistake is thousands of times larger. Tensors whose
///            gradient is mathematically zero (a key bias) are measured against 1 % of the root mean square over all
///            parameters.
/// Errors:    ErrorKind::usage unless 1 <= micro_batch < batch, or if the batch has weight 0; as Gatherer's; whatever
///            the loss function throws.
/// State:     no side effects, even after an exception: gradients are cleared; buffers (BatchNorm), training flags and
///            torch's generators are restored.
/// Cost:      at most ten passes over the batch; three copies of the gradients.
/// Threads:   no other thread may use the model meanwhile.
Verification verify(const AnyModel& model, const BatchSource& batch, const LossFunction& loss, std::int64_t micro_batch,
                    BatchNorm batch_norm = BatchNorm::naive);
Verification verify(const AnyModel& model, const Batch& batch, const LossFunction& loss, std::int64_t micro_batch,
                    BatchNorm batch_norm = BatchNorm::naive);

}  // namespace microbatch
