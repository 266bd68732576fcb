#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace microbatch {

struct Attended {
    at::Tensor out;       ///< [samples, tokens, heads * size]
    at::Tensor log_sums;  ///< [samples * heads, tokens], log of the sum of e^score of a query
};

/// The forward pass of causal_attention without autograd. Requires a contiguous, non-empty fp32 tensor on the CPU.
/// Threads share the heads of all samples.
Attended attend(const at::Tensor& qkv, std::int64_t heads);

/// Its backward pass: the gradient of qkv from that of attended.out, which must be contiguous.
at::Tensor attention_gradient(const at::Tensor& qkv, std::int64_t heads, const Attended& attended,
                              const at::Tensor& gradient);

}  // namespace microbatch
