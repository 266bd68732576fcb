#include "microbatch/nn/causal_attention.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/stack.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cmath>
#include <limits>
#include <vector>

#include "microbatch/core/error.h"
#include "microbatch/core/text.h"
#include "microbatch/nn/in_parallel.h"
#include "microbatch/nn/kernels/kernels.h"

namespace microbatch {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// Where everything of one sample and head is.
class Heads {
public:
    Heads(const at::Tensor& qkv, std::int64_t heads)
        : samples_(qkv.size(0)), tokens_(qkv.size(1)), heads_(heads), width_(qkv.size(2) / 3), qkv_(qkv) {}

    std::int64_t count() const { return samples_ * heads_; }
    std::int64_t tokens() const { return tokens_; }
    std::int64_t size() const { return width_ / heads_; }

    AttentionHead operator()(std::int64_t number, const at::Tensor& out, const at::Tensor& log_sums) const {
        const float* input = qkv_.const_data_ptr<float>() + of_input(number);
        return {.tokens = tokens_,
                .size = size(),
                .scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(size()))),
                .row = 3 * width_,
                .out_row = width_,
                .q = input,
                .k = input + width_,
                .v = input + 2 * width_,
                .out = out.data_ptr<float>() + of_output(number),
                .log_sums = log_sums.data_ptr<float>() + number * tokens_};
    }

    void add_gradients(AttentionHead& head, std::int64_t number, const at::Tensor& gradient, at::Tensor& of_qkv) const {
        head.gradient = gradient.const_data_ptr<float>() + of_output(number);
        head.of_q = of_qkv.mutable_data_ptr<float>() + of_input(number);
        head.of_k = head.of_q + width_;
        head.of_v = head.of_k + width_;
    }

private:
    std::int64_t of_input(std::int64_t number) const {
        return number / heads_ * tokens_ * 3 * width_ + number % heads_ * size();
    }
    std::int64_t of_output(std::int64_t number) const {
        return number / heads_ * tokens_ * width_ + number % heads_ * size();
    }

    std::int64_t samples_, tokens_, heads_, width_;
    const at::Tensor& qkv_;
};

/// Calls with every head and memory for it, a share of the heads in each thread.
template <class Call>
void for_each_head(const Heads& heads, std::int64_t scratch, const at::TensorOptions& options, const Call& call) {
    // Counted by the budget, and asked for before any thread begins; the one that has work may be any of them.
    const at::Tensor memory = at::empty({at::get_num_threads(), scratch}, options);
    float* const start = memory.data_ptr<float>();
    in_parallel(heads.count(), 1, [&](std::int64_t begin, std::int64_t end) {
        float* own = start + at::get_thread_num() * scratch;
        for (std::int64_t number = begin; number < end; ++number) call(number, own);
    });
}

/// [samples, heads, tokens, size] each.
std::vector<at::Tensor> by_head(const at::Tensor& qkv, std::int64_t heads) {
    const auto parts = qkv.view({qkv.size(0), qkv.size(1), 3, heads, qkv.size(2) / 3 / heads}).unbind(2);
    return {parts[0].transpose(1, 2), parts[1].transpose(1, 2), parts[2].transpose(1, 2)};
}

/// The gradient as torch's operators give it, which can be differentiated again.
at::Tensor differentiable_gradient(const at::Tensor& qkv, std::int64_t heads, const at::Tensor& gradient) {
    const auto parts = by_head(qkv, heads);
    const double scale = 1.0 / std::sqrt(static_cast<double>(parts[0].size(3)));
    const at::Tensor scores = parts[0].matmul(parts[1].transpose(2, 3)).mul(scale);
    const at::Tensor later = at::full_like(scores, -std::numeric_limits<double>::infinity()).triu(1);
    const at::Tensor p = scores.tril().add(later).softmax(3);
    const at::Tensor of_out = gradient.view({qkv.size(0), qkv.size(1), heads, parts[0].size(3)}).transpose(1, 2);
    const at::Tensor of_p = of_out.matmul(parts[2].transpose(2, 3));
    const at::Tensor of_scores = p.mul(of_p.sub(p.mul(of_p).sum(3, /*keepdim=*/true))).mul(scale);
    const auto by_token = [](const at::Tensor& one) { return one.transpose(1, 2); };
    return at::stack({by_token(of_scores.matmul(parts[1])), by_token(of_scores.transpose(2, 3).matmul(parts[0])),
                      by_token(p.transpose(2, 3).matmul(of_out))},
                     2)
        .reshape(qkv.sizes());
}

class CausalAttention : public torch::autograd::Function<CausalAttention> {
public:
    static at::Tensor forward(AutogradContext* context, const at::Tensor& qkv, std::int64_t heads) {
        const Heads all(qkv, heads);
        const at::Tensor out = at::empty({qkv.size(0), qkv.size(1), qkv.size(2) / 3}, qkv.options());
        const at::Tensor log_sums = at::empty({all.count(), all.tokens()}, qkv.options());
        for_each_head(all, kernels().attention_forward_scratch(all.tokens(), all.size()), qkv.options(),
                      [&](std::int64_t number, float* scratch) {
                          kernels().attention_forward(all(number, out, log_sums), scratch);
                      });
        context->save_for_backward({qkv, out, log_sums});
        context->saved_data["heads"] = heads;
        return out;
    }

    static variable_list backward(AutogradContext* context, const variable_list& gradients) {
        const variable_list saved = context->get_saved_variables();
        const at::Tensor &qkv = saved[0], &out = saved[1], &log_sums = saved[2];
        const std::int64_t heads = context->saved_data["heads"].toInt();
        const at::Tensor gradient = gradients[0].contiguous();
        if (at::GradMode::is_enabled()) return {differentiable_gradient(qkv, heads, gradient), at::Tensor()};
        const Heads all(qkv, heads);
        at::Tensor of_qkv = at::empty_like(qkv);
        for_each_head(all, kernels().attention_backward_scratch(all.tokens(), all.size()), qkv.options(),
                      [&](std::int64_t number, float* scratch) {
                          AttentionHead head = all(number, out, log_sums);
                          all.add_gradients(head, number, gradient, of_qkv);
                          kernels().attention_backward(head, scratch);
                      });
        return {of_qkv, at::Tensor()};
    }
};

void require_valid(const at::Tensor& qkv, std::int64_t heads) {
    if (!qkv.defined() || !qkv.is_floating_point() || qkv.dim() != 3 || heads < 1 || qkv.size(2) % (3 * heads) != 0) {
        throw Error(ErrorKind::usage,
                    qkv.defined() ? text("causal_attention: ", qkv.scalar_type(), " of shape ", qkv.sizes(), " and ",
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
