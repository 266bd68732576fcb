#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <utility>

#include "microbatch/ops/fused/attention.h"
#include "microbatch/ops/fused/weight_sink.h"
#include "microbatch/ops/transformer_block.h"

namespace microbatch {

/// What transformer_forward saves for backward.
struct TransformerSaved {
    at::Tensor qkv;  ///< [samples, tokens, 3 width]
    Attended attended;
    at::Tensor middle;      ///< as x, after attention was added
    at::Tensor expanded;    ///< [rows, inner], before GELU
    at::Tensor statistics;  ///< [4, rows]: means and inverse deviations of the first norm, then of the second
};

/// transformer_block without autograd. Requires contiguous fp32 tensors on the CPU of matching shapes; weights are
/// [outputs, inputs], as such or as the transpose of a contiguous matrix.
std::pair<at::Tensor, TransformerSaved> transformer_forward(const at::Tensor& x, const TransformerWeights& weights,
                                                            std::int64_t heads, const TransformerDetails& details);

/// The gradient of x, from the result's. The weights' gradients go to the sink as soon as each is known, so that few
/// are held at a time; they are numbered in the order of TransformerWeights, with the shifts last.
at::Tensor transformer_backward(const at::Tensor& x, const TransformerWeights& weights, std::int64_t heads,
                                const TransformerDetails& details, const TransformerSaved& saved,
                                const at::Tensor& gradient, const GradientSink& sink);

}  // namespace microbatch
