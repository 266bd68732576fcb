#include "microbatch/ops/causal_attention.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/scaled_dot_product_attention.h>

#include <cmath>
#include <limits>

#include "microbatch/autograd/fused.h"
#include "microbatch/autograd/sum_in_place.h"
#include "microbatch/core/error.h"
#include "microbatch/ops/checks.h"
#include "microbatch/ops/fused/attention.h"

namespace microbatch {
namespace {

/// [samples, heads, tokens, size].
at::Tensor by_head(const at::Tensor& x, std::int64_t heads) {
    return x.view({x.size(0), x.size(1), heads, x.size(2) / heads}).transpose(1, 2);
}

/// [samples or 1, 1, queries, keys]: which keys a query attends to.
at::Tensor mask_of(const AttentionInputs& in) {
    const std::int64_t tokens = in.q.size(1);
    at::Tensor mask = at::ones({1, 1, tokens, tokens}, in.q.options().dtype(at::kBool).requires_grad(false));
    if (in.causal) mask = mask.tril();
    if (in.lengths.defined()) {
        const at::Tensor lengths = in.lengths.to(in.q.device());
        mask = mask.logical_and(at::arange(tokens, lengths.options()).lt(lengths.view({-1, 1, 1, 1})));
    }
    return mask;
}

at::Tensor attention_by_operators(const AttentionInputs& in) {
    const auto shared = [&](const at::Tensor& x) {
        const at::Tensor apart = by_head(x, in.kv_heads);
        return in.heads == in.kv_heads ? apart : apart.repeat_interleave(in.heads / in.kv_heads, 1);
    };
    const at::Tensor q = by_head(in.q, in.heads);
    const at::Tensor scores =
        q.matmul(shared(in.k).transpose(2, 3)).mul(1.0 / std::sqrt(static_cast<double>(q.size(3))));
    return scores.masked_fill(mask_of(in).logical_not(), -std::numeric_limits<double>::infinity())
        .softmax(3)
        .matmul(shared(in.v))
        .transpose(1, 2)
        .flatten(2);
}

/// For types and devices that the fused version does not support.
at::Tensor attention_by_torch(const AttentionInputs& in) {
    if (in.heads != in.kv_heads) return attention_by_operators(in);
    const bool plain = in.causal && !in.lengths.defined();
    const std::optional<at::Tensor> mask = plain ? std::nullopt : std::optional(mask_of(in));
    return at::scaled_dot_product_attention(by_head(in.q, in.heads), by_head(in.k, in.heads), by_head(in.v, in.heads),
                                            mask, 0.0, plain)
        .transpose(1, 2)
        .flatten(2);
}

struct FusedCausalAttention {
    std::int64_t heads;
    at::Tensor lengths;

    FusedResult forward(const variable_list& inputs) const {
        const Attended attended = attend(interleaved(inputs[0], heads, lengths));
        return {attended.out, {attended.out, attended.log_sums}};
    }

    variable_list backward(const FusedBackward& of) const {
        at::Tensor grad_qkv = at::empty_like(of.inputs[0]);
        attention_gradient(interleaved(of.inputs[0], heads, lengths), {of.saved[0], of.saved[1]},
                           of.gradient.contiguous(), interleaved(grad_qkv, heads));
        return {grad_qkv};
    }

    at::Tensor by_operators(const variable_list& inputs) const {
        return attention_by_operators(interleaved(inputs[0], heads, lengths));
    }
};

struct FusedAttention {
    std::int64_t heads, kv_heads;
    bool causal;
    at::Tensor lengths;

    AttentionInputs inputs_of(const variable_list& v) const {
        return {.q = v[0],
                .k = v[1],
                .v = v[2],
                .heads = heads,
                .kv_heads = kv_heads,
                .causal = causal,
                .lengths = lengths};
    }

    FusedResult forward(const variable_list& inputs) const {
        const Attended attended = attend(inputs_of(inputs));
        return {attended.out, {attended.out, attended.log_sums}};
    }

    variable_list backward(const FusedBackward& of) const {
        variable_list results;
        for (const at::Tensor& input : of.inputs) results.push_back(at::empty_like(input));
        attention_gradient(inputs_of(of.inputs), {of.saved[0], of.saved[1]}, of.gradient.contiguous(),
                           inputs_of(results));
        return results;
    }

    at::Tensor by_operators(const variable_list& inputs) const { return attention_by_operators(inputs_of(inputs)); }
};

bool is_fast(const at::Tensor& x) {
    return is_fp32_on_cpu(x) && x.numel() > 0 && !operators_are_watched();
}

}  // namespace

at::Tensor causal_attention(const at::Tensor& qkv, std::int64_t heads, const at::Tensor& lengths) {
    require_that(qkv.defined(), "causal_attention: queries, keys and values are an undefined tensor");
    require_that(qkv.is_floating_point() && qkv.dim() == 3 && heads >= 1 && qkv.size(2) % (3 * heads) == 0,
                 "causal_attention: ", qkv.scalar_type(), " of shape ", qkv.sizes(), " and ", heads,
                 " heads; give floating point of [samples, tokens, 3 * heads * size]");
    require_lengths("causal_attention", lengths, qkv.size(0), qkv.size(1));
    const at::Tensor whole = qkv.contiguous();
    if (is_fast(whole)) return Fused<FusedCausalAttention>::of({heads, lengths}, {whole});
    return attention_by_torch(interleaved(whole, heads, lengths));
}

at::Tensor attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, std::int64_t heads,
                     std::int64_t kv_heads, bool causal, const at::Tensor& lengths) {
    require_that(q.defined() && k.defined() && v.defined(),
                 "attention: queries, keys or values are an undefined tensor");
    require_that(
        q.is_floating_point() && q.dim() == 3 && heads >= 1 && kv_heads >= 1 && heads % kv_heads == 0 &&
            q.size(2) % heads == 0 && k.sizes() == v.sizes() && k.dim() == 3 && k.size(0) == q.size(0) &&
            k.size(1) == q.size(1) && k.size(2) == q.size(2) / heads * kv_heads && k.scalar_type() == q.scalar_type() &&
            v.scalar_type() == q.scalar_type(),
        "attention: queries of shape ", q.sizes(), ", keys of ", k.sizes(), ", values of ", v.sizes(), ", ", heads,
        " heads and ", kv_heads,
        " of keys; give floating point of [samples, tokens, heads * size] and [samples, tokens, kv_heads * size]");
    require_lengths("attention", lengths, q.size(0), q.size(1));
    const FusedAttention operation{heads, kv_heads, causal, lengths};
    const variable_list inputs{q.contiguous(), k.contiguous(), v.contiguous()};
    if (is_fast(q) && is_fast(k) && is_fast(v)) return Fused<FusedAttention>::of(operation, inputs);
    return attention_by_torch(operation.inputs_of(inputs));
}

}  // namespace microbatch
