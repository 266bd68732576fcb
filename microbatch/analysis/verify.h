#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "microbatch/step/loss.h"

namespace torch::nn {
class Module;
}

namespace microbatch {

/// Why the gradient of a batch depends on how it is cut.
enum class Cause {
    averaged_loss,     ///< the loss function returns a mean, or a weight that does not grow with the micro-batch
    batch_statistics,  ///< a layer such as BatchNorm normalises by the micro-batch it sees
    randomness,        ///< dropout and the like draw other numbers for another cut; no bias, so mostly harmless
    coupled_samples,   ///< the loss mixes samples, as in-batch negatives do
    not_finite,        ///< the loss or a gradient is NaN or infinite
    unknown,
};

/// One line for people: what it is, and what to do about it.
std::string_view describe(Cause cause);

/// A parameter whose gradient is another one when the batch is cut.
struct Difference {
    std::string parameter;
    double relative = 0.0;  ///< |whole - cut| / max(|whole|, |cut|, floor), see verify()
};

struct Verification {
    double tolerance = 0.0;               ///< on Difference::relative
    double loss_difference = 0.0;         ///< |whole - cut| / max(|whole|, |cut|) of the mean losses
    std::vector<Difference> differences;  ///< only those above the tolerance, largest first
    std::vector<Cause> causes;            ///< likely ones, worst first; empty if nothing differs

    bool ok() const { return differences.empty() && causes.empty(); }
};

/// Compares the gradients of `batch` as a whole with those of the same batch cut into `micro_batch` samples, on the
/// user's own model, and says which parameters differ and why.
///
/// Any cut tells of a loss that was averaged: where equal micro-batches hide a mean of means from the gradients, its
/// weights do not add up. What depends on other counts (the longest sample, say) shows if these differ in the batch.
/// Tolerance: the square root of the dtype's epsilon: half of the digits. Cutting differently changes rounding alone,
///            thousands of times less; each known mistake is thousands of times more. Tensors whose gradient is
///            mathematically zero (a key bias) are measured against 1 % of the root mean square over all parameters.
/// Errors:    ErrorKind::usage unless 1 <= micro_batch < batch, or if the batch has weight 0; as Gatherer's; what the
/// loss function throws. State:     leaves no trace, after an exception neither: gradients cleared, buffers
/// (BatchNorm), training flags and
///            torch's generators as before.
/// Cost:      at most ten passes over the batch; three copies of the gradients.
/// Threads:   no other use of the model at the same time.
Verification verify(torch::nn::Module& model, const Batch& batch, const LossFunction& loss, std::int64_t micro_batch);

}  // namespace microbatch
