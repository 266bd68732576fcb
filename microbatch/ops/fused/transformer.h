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

/// What transformer_forward keeps for backward.
struct TransformerSaved {
    at::Tensor qkv;  ///< [samples, tokens, 3 width]
    Attended attended;
    at::Tensor middle;      ///< as x, after attention was added
    at::Tensor expanded;    ///< [rows, inner], before GELU
    at::Tensor statistics;  ///< [4, rows]: means and inverse deviations of the first norm, then of the second
};

/// Takes what the gradient of a weight is made of, by its place in TransformerWeights: left^T right of matrices with
/// the same rows, or left itself where right is undefined. Valid during the call only.
using GradientSink = std::function<void(std::size_t weight, const at::Tensor& left, const at::Tensor& right)>;

/// transformer_block without autograd: everything fp32, contiguous, on the CPU and of fitting shapes.
std::pair<at::Tensor, TransformerSaved> transformer_forward(const at::Tensor& x, const TransformerWeights& weights,
                                                            std::int64_t heads);

/// The gradient of x, from that of the result. The weights' go into the sink, each when it is known, so that few are
/// held at a time.
at::Tensor transformer_backward(const at::Tensor& x, const TransformerWeights& weights, std::int64_t heads,
                                const TransformerSaved& saved, const at::Tensor& gradient, const GradientSink& sink);

/// sum += left^T right, sum contiguous [left's columns, right's columns], the others as the sink is given them.
void add_product(const at::Tensor& left, const at::Tensor& right, at::Tensor& sum);

}  // namespace microbatch
