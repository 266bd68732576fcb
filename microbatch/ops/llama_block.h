#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace microbatch {

/// The parameters of a block, as torch's modules keep them: a linear layer's weight is [outputs, inputs]. Biases are
/// undefined where a layer has none.
struct LlamaWeights {
    at::Tensor attention_norm_scale;                               ///< [width]
    at::Tensor q_weight, k_weight, v_weight;                       ///< [heads * size, width], [kv_heads * size, width]
    at::Tensor projection_weight;                                  ///< [width, heads * size]
    at::Tensor mlp_norm_scale;                                     ///< [width]
    at::Tensor gate_weight, expansion_weight, contraction_weight;  ///< [inner, width], [inner, width], [width, inner]
    at::Tensor q_bias = {}, k_bias = {}, v_bias = {};              ///< [heads * size], [kv_heads * size]
};

struct LlamaDetails {
    std::int64_t heads = 1, kv_heads = 1;
    double epsilon = 1e-6;    ///< of the norms
    at::Tensor lengths = {};  ///< [samples], int64: from where the tokens are padding; undefined: no padding
};

/// A Llama block: causal attention with rotary positions, then a gated MLP, each applied to an RMS norm of the residual
/// stream and added to it. Mistral's and Qwen2's are the same.
///
/// Formula:  m = x + P(attention(rotate(Q n), rotate(K n), V n)), n = norm(x);
///           result = m + C(silu(G n') * E n'), n' = norm(m).
/// Source:   Touvron et al. 2023, arXiv:2302.13971; Su et al. 2021, arXiv:2104.09864, for the positions.
/// Shapes:   x [samples, tokens, width]; cosines and sines [1 or samples, tokens, size] -> as x.
/// Errors:   torch's own; ErrorKind::usage as attention.
/// State:    differentiable twice, with respect to x and the weights. x and all weights must be unchanged when backward
///           runs.
/// Numerics: in fp32 on the CPU without autocast, the block is one operation, in which a row stays with one thread
///           throughout; gradients are summed over rows in fp32, 32 rows at a time. Otherwise it runs torch's operators
///           one by one: the same values up to rounding.
/// Cost:     saves 2 widths, queries, keys, values, attention's result and 2 inner per token for backward. Weight
///           gradients as by InPlaceGradients.
at::Tensor llama_block(const at::Tensor& x, const at::Tensor& cosines, const at::Tensor& sines,
                       const LlamaWeights& weights, const LlamaDetails& details);

/// The same by torch's operators one by one: the reference for the fused version.
at::Tensor llama_block_by_operators(const at::Tensor& x, const at::Tensor& cosines, const at::Tensor& sines,
                                    const LlamaWeights& weights, const LlamaDetails& details);

}  // namespace microbatch
