#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "microbatch/ops/residual_block.h"

namespace microbatch {

/// A convolution that preserves the image size, divided by the stride; weight [outputs, inputs, k, k], k odd.
at::Tensor convolution(const at::Tensor& x, const at::Tensor& weight, std::int64_t stride);

/// What residual_forward saves of some samples for backward.
struct ResidualSaved {
    at::Tensor first, second;  ///< outputs of the convolutions
    at::Tensor projected;      ///< undefined where there is no projection
    at::Tensor statistics;     ///< [3, samples, 2, groups]: of each norm the means and the inverse deviations
};

/// residual_block without autograd. Requires fp32 tensors on the CPU of matching shapes, images with the channels of a
/// pixel side by side. The batch is saved in parts, in order.
std::pair<at::Tensor, std::vector<ResidualSaved>> residual_forward(const at::Tensor& x, const ResidualWeights& weights,
                                                                   const ResidualOptions& options);

/// Which gradients are needed; those of the norms' scales and shifts cost next to nothing.
struct ResidualWanted {
    bool x = true, first = true, second = true, projection = true;
};

/// The gradients of x and of the weights, in the order of ResidualWeights, from the result's gradient; undefined where
/// not needed.
std::vector<at::Tensor> residual_backward(const at::Tensor& x, const ResidualWeights& weights,
                                          const ResidualOptions& options, const at::Tensor& out,
                                          const std::vector<ResidualSaved>& saved, const at::Tensor& gradient,
                                          const ResidualWanted& wanted);

}  // namespace microbatch
