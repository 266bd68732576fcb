#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace microbatch {

/// Causal multi-head attention: each token attends to itself and the tokens before it. Queries, keys and values are
/// interleaved in one tensor.
///
/// Formula:  softmax(Q K^T / sqrt(size), keys up to the query's own) V for every sample and head.
/// Source:   Vaswani et al. 2017, arXiv:1706.03762; memory by Dao et al. 2022, arXiv:2205.14135: the probabilities are
///           not saved but recomputed in backward.
/// Shapes:   qkv [samples, tokens, 3 * heads * size]: queries of all heads, then keys, then values; lengths [samples],
///           int64, 1 to tokens: from where a sample's tokens are padding, to which no token attends; undefined: no
///           padding. Result [samples, tokens, heads * size].
/// Errors:   ErrorKind::usage if qkv is not floating point of that shape, or the lengths are not what is said above.
/// State:    saves qkv, the result and one number per token and head for backward. Differentiable twice.
/// Numerics: sums in fp32; NaN in a token reaches every later token of its sample and head, and may reach the five
///           before it.
/// Cost:     fp32 on the CPU: half to a quarter of the time of torch's own, which handles everything else. Temporary
///           memory in backward: eight copies of a head per thread. Threads share the heads of all samples.
at::Tensor causal_attention(const at::Tensor& qkv, std::int64_t heads, const at::Tensor& lengths = {});

/// Attention with queries, keys and values in tensors of their own, causal or from every token to every other one.
/// Several heads of queries may share one of keys and values (Ainslie et al. 2023, arXiv:2305.13245).
///
/// Shapes:   q [samples, tokens, heads * size], k and v [samples, tokens, kv_heads * size], kv_heads a divisor of heads;
///           lengths as for causal_attention. Result as q.
/// Errors:   ErrorKind::usage if shapes, types or lengths are not what is said above.
/// State, numerics and cost: as causal_attention.
at::Tensor attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, std::int64_t heads,
                     std::int64_t kv_heads, bool causal, const at::Tensor& lengths = {});

}  // namespace microbatch
