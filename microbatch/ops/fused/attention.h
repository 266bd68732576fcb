#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace microbatch {

/// What attention works on: fp32 on the CPU, views of one tensor or tensors of their own. The numbers of a token lie side
/// by side, and a sample's tokens at equal distances right after the sample before.
struct AttentionInputs {
    at::Tensor q;     ///< [samples, tokens, heads * size]
    at::Tensor k, v;  ///< [samples, tokens, kv_heads * size], k and v at the same distances; as many heads share one
    std::int64_t heads = 1, kv_heads = 1;
    bool causal = true;
    at::Tensor lengths = {};  ///< [samples], int64, 1 to tokens: how many of a sample's tokens are keys; undefined: all
};

/// Of queries, keys and values side by side: [samples, tokens, 3 * heads * size].
AttentionInputs interleaved(const at::Tensor& qkv, std::int64_t heads, const at::Tensor& lengths = {});

struct Attended {
    at::Tensor out;       ///< [samples, tokens, heads * size]
    at::Tensor log_sums;  ///< [samples * heads, tokens], log of the sum of e^score of a query
};

/// The forward pass of attention without autograd. Threads share the heads of all samples.
Attended attend(const AttentionInputs& inputs);

/// Its backward pass, from the gradient of attended.out, which must be contiguous: the gradients of q, k and v are written
/// to those of `gradients`, which are laid out like the inputs'.
void attention_gradient(const AttentionInputs& inputs, const Attended& attended, const at::Tensor& gradient,
                        const AttentionInputs& gradients);

}  // namespace microbatch
