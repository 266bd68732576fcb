#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace microbatch {

/// What every token takes from the tokens up to its own, by head, from queries, keys and values side by side.
///
/// Formula:  softmax(Q K^T / sqrt(size), keys up to the query's own) V for every sample and head.
/// Source:   Vaswani et al. 2017, arXiv:1706.03762; memory by Dao et al. 2022, arXiv:2205.14135: the probabilities are
///           never saved, but computed again in backward.
/// Shapes:   qkv [samples, tokens, 3 * heads * size]: queries of all heads, then keys, then values; result
///           [samples, tokens, heads * size].
/// Errors:   ErrorKind::usage if qkv is not floating point of that shape.
/// State:    keeps qkv, the result and a number for every token and head for backward. Differentiable twice.
/// Numerics: sums in fp32; NaN in a token reaches every later one of its sample and head, and may reach the
///           five before it.
/// Cost:     CPU and fp32: half to a quarter of the time of torch's own, which takes everything else. Temporary memory:
///           backward eight copies of a head for each thread. Threads share out the heads of all samples.
at::Tensor causal_attention(const at::Tensor& qkv, std::int64_t heads);

}  // namespace microbatch
