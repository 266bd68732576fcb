#include "microbatch/ops/transformer_block.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/dropout.h>
#include <ATen/ops/layer_norm.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <array>
#include <utility>

#include "microbatch/autograd/differentiable.h"
#include "microbatch/autograd/in_place_gradients.h"
#include "microbatch/autograd/sum_in_place.h"
#include "microbatch/ops/causal_attention.h"
#include "microbatch/ops/fused/transformer.h"
#include "microbatch/ops/gelu.h"
#include "microbatch/runtime/gemm.h"

namespace microbatch {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr std::size_t weight_count = 12;

/// In the order in which FusedBlock takes them.
std::array<const at::Tensor*, weight_count> all_of(const TransformerWeights& w) {
    return {&w.attention_norm_scale, &w.attention_norm_shift, &w.qkv_weight,         &w.qkv_bias,
            &w.projection_weight,    &w.projection_bias,      &w.mlp_norm_scale,     &w.mlp_norm_shift,
            &w.expansion_weight,     &w.expansion_bias,       &w.contraction_weight, &w.contraction_bias};
}

/// From variables of which the first is x.
TransformerWeights weights_of(const variable_list& v) {
    return {v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9], v[10], v[11], v[12]};
}

at::Tensor norm(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& shift) {
    return at::layer_norm(x, x.size(-1), scale, shift, transformer_epsilon);
}

/// Rows of numbers: torch adds the bias inside the product for 2-D inputs only.
at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
    return at::addmm(bias, x.flatten(0, -2), weight.t());
}

class FusedBlock : public torch::autograd::Function<FusedBlock> {
public:
    static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& w1, const at::Tensor& w2,
                              const at::Tensor& w3, const at::Tensor& w4, const at::Tensor& w5, const at::Tensor& w6,
                              const at::Tensor& w7, const at::Tensor& w8, const at::Tensor& w9, const at::Tensor& w10,
                              const at::Tensor& w11, const at::Tensor& w12, std::int64_t heads) {
        context->set_materialize_grads(false);
        const variable_list inputs{x, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12};
        auto [out, saved] = transformer_forward(x, weights_of(inputs), heads);
        variable_list tensors = inputs;
        tensors.insert(tensors.end(), {saved.qkv, saved.attended.out, saved.attended.log_sums, saved.middle,
                                       saved.expanded, saved.statistics});
        context->save_for_backward(std::move(tensors));
        context->saved_data["heads"] = heads;
        context->saved_data["in_place"] = InPlaceGradients::active();
        return out;
    }

    static variable_list backward(AutogradContext* context, const variable_list& gradients) {
        variable_list results(1 + weight_count + 1);
        if (!gradients[0].defined()) return results;
        const variable_list tensors = context->get_saved_variables();
        const variable_list inputs(tensors.begin(), tensors.begin() + 1 + weight_count);
        const std::int64_t heads = context->saved_data["heads"].toInt();
        const at::Tensor gradient = gradients[0].contiguous();
        if (at::GradMode::is_enabled()) {
            variable_list found = differentiable_gradients(
                *context, inputs,
                [&](const variable_list& own) {
                    return transformer_block_by_operators(own[0], weights_of(own), heads);
                },
                gradient);
            std::move(found.begin(), found.end(), results.begin());
            return results;
        }
        const auto* saved = tensors.data() + 1 + weight_count;
        const bool in_place = context->saved_data["in_place"].toBool();
        const GradientSink sink = [&](std::size_t weight, const at::Tensor& left, const at::Tensor& right) {
            if (!context->needs_input_grad(1 + weight)) return;
            const at::Tensor& leaf = inputs[1 + weight];
            if (in_place && add_to_leaf(leaf, left, right)) return;
            results[1 + weight] = right.defined() ? gemm(left.t(), right) : left.clone();
        };
        results[0] =
            transformer_backward(inputs[0], weights_of(inputs), heads,
                                 {saved[0], {saved[1], saved[2]}, saved[3], saved[4], saved[5]}, gradient, sink);
        return results;
    }

private:
    static bool add_to_leaf(const at::Tensor& leaf, const at::Tensor& left, const at::Tensor& right) {
        if (!right.defined()) return sum_in_place(leaf, {left}, [&](at::Tensor& sum) { sum.add_(left); });
        return sum_in_place(leaf, {left, right}, [&](at::Tensor& sum) {
            if (!sum.is_contiguous()) {
                sum.addmm_(left.t(), right);
                return;
            }
            add_product(left, right, sum);
            torch::autograd::impl::bump_version(sum);  // like every torch operator that writes
        });
    }
};

/// True if the fused version supports these shapes and types; otherwise torch's operators report what is wrong.
bool is_fast(const at::Tensor& x, const TransformerWeights& w, std::int64_t heads, TransformerDropout dropout) {
    if (dropout.attention != 0.0 || dropout.mlp != 0.0 || !is_fp32_on_cpu(x) || x.dim() != 3 || x.numel() == 0 ||
        operators_are_watched() || at::autocast::is_autocast_enabled(at::kCPU)) {
        return false;
    }
    const auto all = all_of(w);
    if (!std::all_of(all.begin(), all.end(),
                     [](const at::Tensor* one) { return is_fp32_on_cpu(*one) && one->is_contiguous(); })) {
        return false;
    }
    const std::int64_t width = x.size(2), inner = w.expansion_bias.numel();
    const auto is_linear = [](const at::Tensor& weight, const at::Tensor& bias, std::int64_t in, std::int64_t out) {
        return weight.sizes() == at::IntArrayRef{out, in} && bias.sizes() == at::IntArrayRef{out};
    };
    const auto is_norm = [&](const at::Tensor& scale, const at::Tensor& shift) {
        return scale.sizes() == at::IntArrayRef{width} && shift.sizes() == at::IntArrayRef{width};
    };
    return heads >= 1 && width % heads == 0 && inner >= 1 && is_norm(w.attention_norm_scale, w.attention_norm_shift) &&
           is_norm(w.mlp_norm_scale, w.mlp_norm_shift) && is_linear(w.qkv_weight, w.qkv_bias, width, 3 * width) &&
           is_linear(w.projection_weight, w.projection_bias, width, width) &&
           is_linear(w.expansion_weight, w.expansion_bias, width, inner) &&
           is_linear(w.contraction_weight, w.contraction_bias, inner, width) && !prefers_onednn(width * width);
}

}  // namespace

at::Tensor transformer_block_by_operators(const at::Tensor& x, const TransformerWeights& w, std::int64_t heads,
                                          TransformerDropout dropout) {
    const auto dropped = [&](const at::Tensor& rows, double share) {
        return at::dropout(rows.view_as(x), share, share > 0.0);
    };
    const at::Tensor qkv = linear(norm(x, w.attention_norm_scale, w.attention_norm_shift), w.qkv_weight, w.qkv_bias);
    const at::Tensor attended = causal_attention(qkv.view({x.size(0), x.size(1), qkv.size(-1)}), heads);
    const at::Tensor middle = x + dropped(linear(attended, w.projection_weight, w.projection_bias), dropout.attention);
    const at::Tensor normed = norm(middle, w.mlp_norm_scale, w.mlp_norm_shift);
    const at::Tensor expanded = gelu_tanh(linear(normed, w.expansion_weight, w.expansion_bias));
    return middle + dropped(linear(expanded, w.contraction_weight, w.contraction_bias), dropout.mlp);
}

at::Tensor transformer_block(const at::Tensor& x, const TransformerWeights& w, std::int64_t heads,
                             TransformerDropout dropout) {
    if (!is_fast(x, w, heads, dropout)) return transformer_block_by_operators(x, w, heads, dropout);
    return FusedBlock::apply(x.contiguous(), w.attention_norm_scale, w.attention_norm_shift, w.qkv_weight, w.qkv_bias,
                             w.projection_weight, w.projection_bias, w.mlp_norm_scale, w.mlp_norm_shift,
                             w.expansion_weight, w.expansion_bias, w.contraction_weight, w.contraction_bias, heads);
}

}  // namespace microbatch
