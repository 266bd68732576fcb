#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "microbatch/core/noise_scale.h"
#include "microbatch/step/loss.h"

namespace microbatch {

/// The values of tensors of one element, waiting for their device once. On several devices, once for each tensor.
std::vector<double> numbers_in(const std::vector<at::Tensor>& tensors);

/// What is summed over the micro-batches of a batch beside the gradients, in fp64. What is on a device stays there until
/// read(), so that no micro-batch waits for it.
class BatchTotals {
public:
    BatchTotals() = default;
    /// Of a batch that was interrupted.
    BatchTotals(double loss_sum, double weight, const NoiseSums& parts)
        : loss_sum_(loss_sum), weight_(weight), parts_(parts) {}

    /// Adds a weight, before backward. Errors: ErrorKind::usage if the sum is not finite, where it is known.
    void count(const Weight& weight);

    /// Adds the sum of the loss, after backward, and the squared norm of its gradient if that is defined.
    void add(const WeightedLoss& loss, const at::Tensor& squared_norm = {});

    /// False if every weight so far is known to be 0.
    bool may_have_weight() const { return weight_ > 0.0 || weight_on_device_.defined(); }

    /// Reads what is on the device, in one piece. Errors: ErrorKind::usage if a weight is negative or not finite, or the
    /// sum of the weights is not.
    void read();

    /// Requires: read() since the last micro-batch.
    double loss_sum() const { return loss_sum_; }
    double weight() const { return weight_; }
    const NoiseSums& parts() const { return parts_; }

private:
    struct Part {
        Weight weight;
        at::Tensor squared_norm;
    };

    double loss_sum_ = 0.0, weight_ = 0.0;
    NoiseSums parts_;
    // Instead of the numbers, from the first micro-batch on a device to read(); otherwise undefined.
    at::Tensor loss_on_device_, weight_on_device_, least_weight_;
    std::vector<Part> unread_parts_;
};

}  // namespace microbatch
