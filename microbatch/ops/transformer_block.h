#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace microbatch {

/// The parameters of a block, as torch's modules keep them: a linear layer's weight is [outputs, inputs]. The norms are
/// RMS norms where the shifts are undefined.
struct TransformerWeights {
    at::Tensor attention_norm_scale, attention_norm_shift;  ///< [width], both shifts or none
    at::Tensor qkv_weight, qkv_bias;                        ///< [3 width, width]: queries, keys, values
    at::Tensor projection_weight, projection_bias;          ///< [width, width]
    at::Tensor mlp_norm_scale, mlp_norm_shift;              ///< [width]
    at::Tensor expansion_weight, expansion_bias;            ///< [inner, width]
    at::Tensor contraction_weight, contraction_bias;        ///< [width, inner]
};

/// Probabilities of dropping what a branch adds; 0 when the model is not training.
struct TransformerDropout {
    double attention = 0.0, mlp = 0.0;
};

/// How a block is written down, where that differs from torch's modules and from GPT-2.
struct TransformerDetails {
    double epsilon = 1e-5;      ///< of the norms
    bool inputs_first = false;  ///< weights are [inputs, outputs], as `Conv1D` of Hugging Face has them
    at::Tensor lengths = {};    ///< [samples], int64: from where the tokens are padding; undefined: no padding
};

/// A GPT-2 block: causal attention, then two linear layers with GELU between them, each applied to a norm of the
/// residual stream and added to it.
///
/// Formula:  m = x + dropout(P(attention(QKV(norm(x))))), result = m + dropout(C(gelu(E(norm(m))))).
/// Source:   Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; RMS norm as in rms_norm.
/// Shapes:   x [samples, tokens, width] -> the same.
/// Errors:   torch's own; ErrorKind::usage as causal_attention.
/// State:    differentiable twice. x and all weights must be unchanged when backward runs. Dropout draws from torch's
///           default generator; a probability of 0 draws nothing.
/// Numerics: in fp32 on the CPU, without dropout and autocast, and where oneDNN is not faster for these products (see
///           gemm), the block is one operation, in which a row stays with one thread throughout; gradients are summed
///           over rows in fp32, 32 rows at a time. Otherwise it runs torch's operators one by one: the same values up
///           to rounding.
/// Cost:     9 widths + heads + 4 numbers per token are saved for backward (inner being 4 widths); separate operators
///           save 15 widths. Weight gradients as by InPlaceGradients.
at::Tensor transformer_block(const at::Tensor& x, const TransformerWeights& weights, std::int64_t heads,
                             TransformerDropout dropout = {}, const TransformerDetails& details = {});

/// The same by torch's operators one by one: the reference for the fused version.
at::Tensor transformer_block_by_operators(const at::Tensor& x, const TransformerWeights& weights, std::int64_t heads,
                                          TransformerDropout dropout = {}, const TransformerDetails& details = {});

}  // namespace microbatch
