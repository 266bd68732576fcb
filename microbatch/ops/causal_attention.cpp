#include "microbatch/ops/causal_attention.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/stack.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cmath>
#include <limits>
#include <vector>

#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"
#include "microbatch/ops/fused/attention.h"

namespace microbatch {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// [samples, heads, tokens, size] each.
std::vector<at::Tensor> by_head(const at::Tensor& qkv, std::int64_t heads) {
    const auto parts = qkv.view({qkv.size(0), qkv.size(1), 3, heads, qkv.size(2) / 3 / heads}).unbind(2);
    return {parts[0].transpose(1, 2), parts[1].transpose(1, 2), parts[2].transpose(1, 2)};
}

/// The gradient by torch's operators, which can be differentiated again.
at::Tensor differentiable_gradient(const at::Tensor& qkv, std::int64_t heads, const at::Tensor& gradient) {
    const auto parts = by_head(qkv, heads);
    const double scale = 1.0 / std::sqrt(static_cast<double>(parts[0].size(3)));
    const at::Tensor scores = parts[0].matmul(parts[1].transpose(2, 3)).mul(scale);
    const at::Tensor later = at::full_like(scores, -std::numeric_limits<double>::infinity()).triu(1);
    const at::Tensor p = scores.tril().add(later).softmax(3);
    const at::Tensor grad_out = gradient.view({qkv.size(0), qkv.size(1), heads, parts[0].size(3)}).transpose(1, 2);
    const at::Tensor grad_p = grad_out.matmul(parts[2].transpose(2, 3));
    const at::Tensor grad_scores = p.mul(grad_p.sub(p.mul(grad_p).sum(3, /*keepdim=*/true))).mul(scale);
    const auto by_token = [](const at::Tensor& one) { return one.transpose(1, 2); };
    return at::stack({by_token(grad_scores.matmul(parts[1])), by_token(grad_scores.transpose(2, 3).matmul(parts[0])),
                      by_token(p.transpose(2, 3).matmul(grad_out))},
                     2)
        .reshape(qkv.sizes());
}

class CausalAttention : public torch::autograd::Function<CausalAttention> {
public:
    static at::Tensor forward(AutogradContext* context, const at::Tensor& qkv, std::int64_t heads) {
        const Attended attended = attend(qkv, heads);
        context->save_for_backward({qkv, attended.out, attended.log_sums});
        context->saved_data["heads"] = heads;
        return attended.out;
    }

    static variable_list backward(AutogradContext* context, const variable_list& gradients) {
        const variable_list saved = context->get_saved_variables();
        const at::Tensor &qkv = saved[0], &out = saved[1], &log_sums = saved[2];
        const std::int64_t heads = context->saved_data["heads"].toInt();
        const at::Tensor gradient = gradients[0].contiguous();
        if (at::GradMode::is_enabled()) return {differentiable_gradient(qkv, heads, gradient), at::Tensor()};
        return {attention_gradient(qkv, heads, {out, log_sums}, gradient), at::Tensor()};
    }
};

void require_valid(const at::Tensor& qkv, std::int64_t heads) {
    if (!qkv.defined() || !qkv.is_floating_point() || qkv.dim() != 3 || heads < 1 || qkv.size(2) % (3 * heads) != 0) {
        throw Error(ErrorKind::usage,
                    qkv.defined() ? str_cat("causal_attention: ", qkv.scalar_type(), " of shape ", qkv.sizes(), " and ",
                                            heads, " heads; give floating point of [samples, tokens, 3 * heads * size]")
                                  : "causal_attention: queries, keys and values are an undefined tensor");
    }
}

}  // namespace

at::Tensor causal_attention(const at::Tensor& qkv, std::int64_t heads) {
    require_valid(qkv, heads);
    if (qkv.is_cpu() && qkv.scalar_type() == at::kFloat && qkv.numel() > 0) {
        return CausalAttention::apply(qkv.contiguous(), heads);
    }
    const auto parts = by_head(qkv.contiguous(), heads);
    const at::Tensor mixed =
        at::scaled_dot_product_attention(parts[0], parts[1], parts[2], {}, 0.0, /*is_causal=*/true);
    return mixed.transpose(1, 2).flatten(2);
}

}  // namespace microbatch
