#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "microbatch/ops/residual_block.h"

namespace microbatch {

/// A convolution that keeps the image's size, over the stride; weight [outputs, inputs, k, k], k odd.
at::Tensor convolution(const at::Tensor& x, const at::Tensor& weight, std::int64_t stride);

/// What residual_forward keeps of some samples for backward.
struct ResidualSaved {
    at::Tensor first, second;  ///< what the convolutions made
    at::Tensor projected;      ///< undefined where there is no projection
    at::Tensor statistics;     ///< [3, samples, 2, groups]: of each norm the means and the inverse deviations
};

/// residual_block without autograd: everything fp32, on the CPU and of fitting shapes, images with the channels of a
/// pixel side by side. What is saved of the batch is in parts, one behind the other.
std::pair<at::Tensor, std::vector<ResidualSaved>> residual_forward(const at::Tensor& x, const ResidualWeights& weights,
                                                                   const ResidualOptions& options);

/// Which gradients are wanted; those of the norms' scales and shifts cost next to nothing.
struct ResidualWanted {
    bool x = true, first = true, second = true, projection = true;
};

/// The gradients of x and of the weights in the order of ResidualWeights, from that of the result; what is not wanted
/// is undefined.
std::vector<at::Tensor> residual_backward(const at::Tensor& x, const ResidualWeights& weights,
                                          const ResidualOptions& options, const at::Tensor& out,
                                          const std::vector<ResidualSaved>& saved, const at::Tensor& gradient,
                                          const ResidualWanted& wanted);

}  // namespace microbatch
