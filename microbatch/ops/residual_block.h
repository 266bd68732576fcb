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
/// Formula:  relu(norm(second * relu(norm(first * x))) + (x or norm(projection * x))), where * is a convolution that
///           preserves the image size (divided by the stride).
/// Source:   He et al. 2016, section 3.2 and figure 2; Wu and He 2018 for the norm.
/// Shapes:   x [samples, inputs, height, width] -> [samples, outputs, height / stride, width / stride], rounded up.
/// Errors:   torch's own.
/// Numerics: in fp32 on the CPU, with the channels of a pixel side by side (at::MemoryFormat::ChannelsLast) and without
///           autocast, the block is one operation, in which a sample stays with one thread throughout. Otherwise it
///           runs torch's operators one by one: the same values up to rounding.
/// State:    x, the weights and the result must be unchanged when backward runs. Differentiable twice.
/// Cost:     the outputs of the convolutions and the result are saved for backward; separate operators save one more
///           image per norm. One set of weight gradients per thread.
at::Tensor residual_block(const at::Tensor& x, const ResidualWeights& weights, const ResidualOptions& options);

/// The same by torch's operators one by one: the reference for the fused version.
at::Tensor residual_block_by_operators(const at::Tensor& x, const ResidualWeights& weights,
                                       const ResidualOptions& options);

}  // namespace microbatch
