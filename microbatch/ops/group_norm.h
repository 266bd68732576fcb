#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace microbatch {

/// What comes after the norm, in this order.
struct NormTail {
    at::Tensor added = {};  ///< as x, or undefined
    bool relu = false;
};

/// Group norm of images, with the residual connection and the ReLU behind it where asked.
///
/// Formula:  y = (x - mean) / sqrt(variance + epsilon) * scale + shift, mean and variance of a sample's group of
///           channels over all pixels; then y + added; then max(0, y).
/// Source:   Wu and He 2018, "Group Normalization", arXiv:1803.08494.
/// Shapes:   x [samples, channels, height, width], scale and shift [channels] -> as x. groups divides channels.
/// Errors:   torch's own.
/// Numerics: fp32 on the CPU with the channels of a pixel side by side (at::MemoryFormat::ChannelsLast): sums over
///           pixels in fp32, over channels in fp64. The result's memory is laid out so, too. Everything else by torch's
///           operators: the same values to rounding. NaN stays NaN.
/// State:    keeps x, what is added, and the result where there is a ReLU, for backward: none may be changed before.
///           Differentiable twice.
/// Cost:     one operation; samples are shared out among torch's threads.
at::Tensor group_norm(const at::Tensor& x, std::int64_t groups, const at::Tensor& scale, const at::Tensor& shift,
                      double epsilon, const NormTail& tail = {});

/// The same by one operator of torch after the other: what the fast way is held against.
at::Tensor group_norm_by_operators(const at::Tensor& x, std::int64_t groups, const at::Tensor& scale,
                                   const at::Tensor& shift, double epsilon, const NormTail& tail = {});

}  // namespace microbatch
