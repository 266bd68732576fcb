#pragma once

#include <ATen/core/Tensor.h>

#include <utility>

#include "microbatch/ops/fused/attention.h"
#include "microbatch/ops/fused/weight_sink.h"
#include "microbatch/ops/llama_block.h"

namespace microbatch {

/// What llama_forward saves for backward.
struct LlamaSaved {
    at::Tensor qkv;  ///< [samples, tokens, (heads + 2 kv_heads) * size], queries and keys rotated
    Attended attended;
    at::Tensor middle;      ///< as x, after attention was added
    at::Tensor gate, up;    ///< [rows, inner]
    at::Tensor statistics;  ///< [2, rows]: inverse root mean squares of the first norm, then of the second
};

/// llama_block without autograd. Requires contiguous fp32 tensors on the CPU of matching shapes; cosines and sines have
/// a row for every row of x.
std::pair<at::Tensor, LlamaSaved> llama_forward(const at::Tensor& x, const at::Tensor& cosines, const at::Tensor& sines,
                                                const LlamaWeights& weights, const LlamaDetails& details);

/// The gradient of x, from the result's. The weights' gradients go to the sink as soon as each is known, numbered as in
/// LlamaWeights.
at::Tensor llama_backward(const at::Tensor& x, const at::Tensor& cosines, const at::Tensor& sines,
                          const LlamaWeights& weights, const LlamaDetails& details, const LlamaSaved& saved,
                          const at::Tensor& gradient, const GradientSink& sink);

}  // namespace microbatch
