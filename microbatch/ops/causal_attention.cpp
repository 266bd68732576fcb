#include "microbatch/ops/causal_attention.h"

#include <ATen/ops/full_like.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/scaled_dot_product_attention.h>

#include <cmath>
#include <limits>
#include <vector>

#include "microbatch/autograd/fused.h"
#include "microbatch/core/error.h"
#include "microbatch/ops/fused/attention.h"

namespace microbatch {
namespace {

/// [samples, heads, tokens, size] each.
std::vector<at::Tensor> by_head(const at::Tensor& qkv, std::int64_t heads) {
    const auto parts = qkv.view({qkv.size(0), qkv.size(1), 3, heads, qkv.size(2) / 3 / heads}).unbind(2);
    return {parts[0].transpose(1, 2), parts[1].transpose(1, 2), parts[2].transpose(1, 2)};
}

struct FusedCausalAttention {
    std::int64_t heads;

    FusedResult forward(const variable_list& inputs) const {
        const Attended attended = attend(inputs[0], heads);
        return {attended.out, {attended.out, attended.log_sums}};
    }

    variable_list backward(const FusedBackward& of) const {
        return {attention_gradient(of.inputs[0], heads, {of.saved[0], of.saved[1]}, of.gradient.contiguous())};
    }

    at::Tensor by_operators(const variable_list& inputs) const {
        const auto parts = by_head(inputs[0], heads);
        const at::Tensor scores =
            parts[0].matmul(parts[1].transpose(2, 3)).mul(1.0 / std::sqrt(static_cast<double>(parts[0].size(3))));
        const at::Tensor later = at::full_like(scores, -std::numeric_limits<double>::infinity()).triu(1);
        return scores.tril().add(later).softmax(3).matmul(parts[2]).transpose(1, 2).flatten(2);
    }
};

}  // namespace

at::Tensor causal_attention(const at::Tensor& qkv, std::int64_t heads) {
    require_that(qkv.defined(), "causal_attention: queries, keys and values are an undefined tensor");
    require_that(qkv.is_floating_point() && qkv.dim() == 3 && heads >= 1 && qkv.size(2) % (3 * heads) == 0,
                 "causal_attention: ", qkv.scalar_type(), " of shape ", qkv.sizes(), " and ", heads,
                 " heads; give floating point of [samples, tokens, 3 * heads * size]");
    if (qkv.is_cpu() && qkv.scalar_type() == at::kFloat && qkv.numel() > 0) {
        return Fused<FusedCausalAttention>::of({heads}, {qkv.contiguous()});
    }
    const auto parts = by_head(qkv.contiguous(), heads);
    const at::Tensor mixed =
        at::scaled_dot_product_attention(parts[0], parts[1], parts[2], {}, 0.0, /*is_causal=*/true);
    return mixed.transpose(1, 2).flatten(2);
}

}  // namespace microbatch
