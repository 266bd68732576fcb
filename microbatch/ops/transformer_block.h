#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace microbatch {

/// The parameters of a block, as torch's modules keep them: a linear layer's weight is [outputs, inputs].
struct TransformerWeights {
    at::Tensor attention_norm_scale, attention_norm_shift;  ///< [width]
    at::Tensor qkv_weight, qkv_bias;                        ///< [3 width, width]: queries, keys, values
    at::Tensor projection_weight, projection_bias;          ///< [width, width]
    at::Tensor mlp_norm_scale, mlp_norm_shift;              ///< [width]
    at::Tensor expansion_weight, expansion_bias;            ///< [inner, width]
    at::Tensor contraction_weight, contraction_bias;        ///< [width, inner]
};

/// Probabilities with which what a branch adds is dropped; 0 where the model is not in training.
struct TransformerDropout {
    double attention = 0.0, mlp = 0.0;
};

/// A block of GPT-2: causal attention, then two linear layers with GELU between, each on a layer norm of what it is
/// added to.
///
/// Formula:  m = x + dropout(P(attention(QKV(norm(x))))), result = m + dropout(C(gelu(E(norm(m))))).
/// Source:   Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
/// Shapes:   x [samples, tokens, width] -> the same.
/// Errors:   torch's own; ErrorKind::usage as causal_attention.
/// State:    differentiable twice. x and all weights must be unchanged when backward runs. Dropout draws from torch's
/// default generator; with 0 nothing is drawn. Numerics: in fp32 on the CPU without dropout and autocast, and where
/// oneDNN is not the faster for such products (see
///           product), it is one operation, whose rows stay with one thread from product to
///           product; sums of gradients over rows in fp32, 32 rows at a time. The same values as torch's operators one
///           by one to rounding, which everything else gets.
/// Cost:     for every token 9 widths and heads + 4 of numbers are saved for backward (inner being 4 widths); operators
///           one by one keep 15 widths. Weight gradients as by InPlaceGradients.
at::Tensor transformer_block(const at::Tensor& x, const TransformerWeights& weights, std::int64_t heads,
                             TransformerDropout dropout = {});

/// The same by one operator of torch after the other: what the fast way is held against.
at::Tensor transformer_block_by_operators(const at::Tensor& x, const TransformerWeights& weights, std::int64_t heads,
                                          TransformerDropout dropout = {});

}  // namespace microbatch
