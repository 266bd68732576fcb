#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <utility>

#include "microbatch/ops/fused/attention.h"
#include "microbatch/ops/transformer_block.h"

namespace microbatch {

constexpr double transformer_epsilon = 1e-5;  ///< of the layer norms

/// What transformer_forward saves for backward.
struct TransformerSaved {
    at::Tensor qkv;  ///< [samples, tokens, 3 width]
    Attended attended;
    at::Tensor middle;      ///< as x, after attention was added
    at::Tensor expanded;    ///< [rows, inner], before GELU
    at::Tensor statistics;  ///< [4, rows]: means and inverse deviations of the first norm, then of the second
};

/// Receives the factors of a weight's gradient, by the weight's position in TransformerWeights: the gradient is left^T
/// right, or left itself if right is undefined. They are valid during the call only.
using GradientSink = std::function<void(std::size_t weight, const at::Tensor& left, const at::Tensor& right)>;

/// transformer_block without autograd. Requires contiguous fp32 tensors on the CPU of matching shapes.
std::pair<at::Tensor, TransformerSaved> transformer_forward(const at::Tensor& x, const TransformerWeights& weights,
                                                            std::int64_t heads);

/// The gradient of x, from the result's. The weights' gradients go to the sink as soon as each is known, so that few
/// are held at a time.
at::Tensor transformer_backward(const at::Tensor& x, const TransformerWeights& weights, std::int64_t heads,
                                const TransformerSaved& saved, const at::Tensor& gradient, const GradientSink& sink);

/// sum += left^T right, with a contiguous sum [left's columns, right's columns] and factors as given to the sink.
void add_product(const at::Tensor& left, const at::Tensor& right, at::Tensor& sum);

}  // namespace microbatch
