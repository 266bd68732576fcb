#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace microbatch {

/// The parameters of a block, as torch's modules keep them. The projection's are undefined where the block has none.
struct ResidualWeights {
    at::Tensor first, first_scale, first_shift;     ///< [outputs, inputs, k, k], k odd; [outputs]; [outputs]
    at::Tensor second, second_scale, second_shift;  ///< [outputs, outputs, k, k]; [outputs]; [outputs]
    /// [outputs, inputs, 1, 1]; [outputs]; [outputs]
    at::Tensor projection = {}, projection_scale = {}, projection_shift = {};
};

struct ResidualOptions {
    std::int64_t stride = 1;  ///< of the first convolution and the projection
    std::int64_t groups = 1;  ///< of the norms
    double epsilon = 1e-5;
};

/// A block of a residual network for images, with group norm.
///
/// Formula:  relu(norm(second * relu(norm(first * x))) + (x or norm(projection * x))), * being a convolution that keeps
///           the image's size (divided by the stride).
/// Source:   He et al. 2016, section 3.2 and figure 2; Wu and He 2018 for the norm.
/// Shapes:   x [samples, inputs, height, width] -> [samples, outputs, height / stride, width / stride], rounded up.
/// Errors:   torch's own.
/// Numerics: in fp32 on the CPU, with the channels of a pixel side by side (at::MemoryFormat::ChannelsLast) and without
///           autocast, it is one operation, whose samples stay with one thread from convolution to convolution.
///           Everything else by torch's operators: the same values to rounding.
/// State:    x, the weights and the result must be unchanged when backward runs. Differentiable twice.
/// Cost:     what the convolutions make and the result are saved for backward; operators one by one keep an image more
///           for each norm. Gradients of the weights: one set a thread.
at::Tensor residual_block(const at::Tensor& x, const ResidualWeights& weights, const ResidualOptions& options);

/// The same by one operator after the other: what the fast way is held against.
at::Tensor residual_block_by_operators(const at::Tensor& x, const ResidualWeights& weights,
                                       const ResidualOptions& options);

}  // namespace microbatch
