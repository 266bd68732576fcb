#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace microbatch {

/// What follows the norm, in this order.
struct NormTail {
    at::Tensor added = {};  ///< as x, or undefined
    bool relu = false;
};

/// Group norm of images, with an optional residual connection and ReLU after it.
///
/// Formula:  y = (x - mean) / sqrt(variance + epsilon) * scale + shift, mean and variance of a sample's group of
///           channels over all pixels; then y + added; then max(0, y).
/// Source:   Wu and He 2018, "Group Normalization", arXiv:1803.08494.
/// Shapes:   x [samples, channels, height, width], scale and shift [channels] -> as x. groups divides channels.
/// Errors:   torch's own.
/// Numerics: fp32 on the CPU with the channels of a pixel side by side (at::MemoryFormat::ChannelsLast): sums over
///           pixels in fp32, over channels in fp64; the result has the same layout. Otherwise by torch's operators: the
///           same values up to rounding. NaN stays NaN.
/// State:    saves x, what is added and, with ReLU, the result for backward: none may be changed before.
///           Differentiable twice.
/// Cost:     one operation; samples are shared out among torch's threads.
at::Tensor group_norm(const at::Tensor& x, std::int64_t groups, const at::Tensor& scale, const at::Tensor& shift,
                      double epsilon, const NormTail& tail = {});

/// The same by torch's operators one by one: the reference for the fused version.
at::Tensor group_norm_by_operators(const at::Tensor& x, std::int64_t groups, const at::Tensor& scale,
                                   const at::Tensor& shift, double epsilon, const NormTail& tail = {});

}  // namespace microbatch
