#include "microbatch/ops/transformer_block.h"

#include <ATen/autocast_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/dropout.h>
#include <ATen/ops/layer_norm.h>

#include <algorithm>

#include "microbatch/autograd/fused.h"
#include "microbatch/autograd/in_place_gradients.h"
#include "microbatch/autograd/sum_in_place.h"
#include "microbatch/ops/causal_attention.h"
#include "microbatch/ops/checks.h"
#include "microbatch/ops/fused/transformer.h"
#include "microbatch/ops/gelu.h"
#include "microbatch/ops/rms_norm.h"
#include "microbatch/runtime/gemm.h"

namespace microbatch {

namespace {

/// The inputs of FusedBlock: x, and the weights in their order, with the shifts, if there are any, last.
variable_list inputs_of(const at::Tensor& x, const TransformerWeights& w) {
    variable_list inputs{x,
                         w.attention_norm_scale,
                         w.qkv_weight,
                         w.qkv_bias,
                         w.projection_weight,
                         w.projection_bias,
                         w.mlp_norm_scale,
                         w.expansion_weight,
                         w.expansion_bias,
                         w.contraction_weight,
                         w.contraction_bias};
    if (w.attention_norm_shift.defined()) {
        inputs.insert(inputs.end(), {w.attention_norm_shift, w.mlp_norm_shift});
    }
    return inputs;
}

TransformerWeights weights_of(const variable_list& v) {
    const bool shifted = v.size() > 11;
    return {.attention_norm_scale = v[1],
            .attention_norm_shift = shifted ? v[11] : at::Tensor(),
            .qkv_weight = v[2],
            .qkv_bias = v[3],
            .projection_weight = v[4],
            .projection_bias = v[5],
            .mlp_norm_scale = v[6],
            .mlp_norm_shift = shifted ? v[12] : at::Tensor(),
            .expansion_weight = v[7],
            .expansion_bias = v[8],
            .contraction_weight = v[9],
            .contraction_bias = v[10]};
}

/// The same with every weight as [outputs, inputs].
TransformerWeights outputs_first(const TransformerWeights& w, bool inputs_first) {
    if (!inputs_first) return w;
    TransformerWeights turned = w;
    for (at::Tensor* one :
         {&turned.qkv_weight, &turned.projection_weight, &turned.expansion_weight, &turned.contraction_weight}) {
        *one = one->t();
    }
    return turned;
}

class FusedBlock {
public:
    FusedBlock(std::int64_t heads, const TransformerDetails& details) : heads_(heads), details_(details) {}

    FusedResult forward(const variable_list& inputs) const {
        auto [out, saved] = transformer_forward(inputs[0], weights(inputs), heads_, details_);
        return {
            out,
            {saved.qkv, saved.attended.out, saved.attended.log_sums, saved.middle, saved.expanded, saved.statistics}};
    }

    variable_list backward(const FusedBackward& of) const {
        variable_list results(of.inputs.size());
        const GradientSink sink = weight_sink(of, results, in_place_, details_.inputs_first);
        const auto& s = of.saved;
        results[0] = transformer_backward(of.inputs[0], weights(of.inputs), heads_, details_,
                                          {s[0], {s[1], s[2]}, s[3], s[4], s[5]}, of.gradient.contiguous(), sink);
        return results;
    }

    at::Tensor by_operators(const variable_list& inputs) const {
        return transformer_block_by_operators(inputs[0], weights_of(inputs), heads_, {}, details_);
    }

private:
    TransformerWeights weights(const variable_list& inputs) const {
        return outputs_first(weights_of(inputs), details_.inputs_first);
    }

    std::int64_t heads_;
    TransformerDetails details_;
    bool in_place_ = InPlaceGradients::active();
};

/// True if the fused version supports these shapes and types; otherwise torch's operators report what is wrong.
bool is_fast(const at::Tensor& x, const TransformerWeights& w, std::int64_t heads, TransformerDropout dropout,
             bool inputs_first) {
    if (dropout.attention != 0.0 || dropout.mlp != 0.0 || !is_fp32_on_cpu(x) || x.dim() != 3 || x.numel() == 0 ||
        operators_are_watched() || at::autocast::is_autocast_enabled(at::kCPU) ||
        w.attention_norm_shift.defined() != w.mlp_norm_shift.defined()) {
        return false;
    }
    const variable_list inputs = inputs_of(x, w);
    if (!std::all_of(inputs.begin() + 1, inputs.end(),
                     [](const at::Tensor& one) { return is_fp32_on_cpu(one) && one.is_contiguous(); })) {
        return false;
    }
    const std::int64_t width = x.size(2), inner = w.expansion_bias.numel();
    const auto is_linear = [&](const at::Tensor& weight, const at::Tensor& bias, std::int64_t in, std::int64_t out) {
        const std::int64_t rows = inputs_first ? in : out, columns = inputs_first ? out : in;
        return weight.sizes() == at::IntArrayRef{rows, columns} && bias.sizes() == at::IntArrayRef{out};
    };
    const auto is_norm = [&](const at::Tensor& scale, const at::Tensor& shift) {
        return scale.sizes() == at::IntArrayRef{width} && (!shift.defined() || shift.sizes() == at::IntArrayRef{width});
    };
    return heads >= 1 && width % heads == 0 && inner >= 1 && is_norm(w.attention_norm_scale, w.attention_norm_shift) &&
           is_norm(w.mlp_norm_scale, w.mlp_norm_shift) && is_linear(w.qkv_weight, w.qkv_bias, width, 3 * width) &&
           is_linear(w.projection_weight, w.projection_bias, width, width) &&
           is_linear(w.expansion_weight, w.expansion_bias, width, inner) &&
           is_linear(w.contraction_weight, w.contraction_bias, inner, width) && !prefers_onednn(width * width);
}

}  // namespace

at::Tensor transformer_block_by_operators(const at::Tensor& x, const TransformerWeights& w, std::int64_t heads,
                                          TransformerDropout dropout, const TransformerDetails& details) {
    const auto norm = [&](const at::Tensor& rows, const at::Tensor& scale, const at::Tensor& shift) {
        return shift.defined() ? at::layer_norm(rows, rows.size(-1), scale, shift, details.epsilon)
                               : rms_norm_by_operators(rows, scale, details.epsilon);
    };
    // Rows of numbers: torch adds the bias inside the product for 2-D inputs only.
    const auto linear = [&](const at::Tensor& rows, const at::Tensor& weight, const at::Tensor& bias) {
        return at::addmm(bias, rows.flatten(0, -2), details.inputs_first ? weight : weight.t());
    };
    const auto dropped = [&](const at::Tensor& rows, double share) {
        return at::dropout(rows.view_as(x), share, share > 0.0);
    };
    const at::Tensor qkv = linear(norm(x, w.attention_norm_scale, w.attention_norm_shift), w.qkv_weight, w.qkv_bias);
    const at::Tensor attended =
        causal_attention(qkv.view({x.size(0), x.size(1), qkv.size(-1)}), heads, details.lengths);
    const at::Tensor middle = x + dropped(linear(attended, w.projection_weight, w.projection_bias), dropout.attention);
    const at::Tensor normed = norm(middle, w.mlp_norm_scale, w.mlp_norm_shift);
    const at::Tensor expanded = gelu_tanh(linear(normed, w.expansion_weight, w.expansion_bias));
    return middle + dropped(linear(expanded, w.contraction_weight, w.contraction_bias), dropout.mlp);
}

at::Tensor transformer_block(const at::Tensor& x, const TransformerWeights& w, std::int64_t heads,
                             TransformerDropout dropout, const TransformerDetails& details) {
    if (!is_fast(x, w, heads, dropout, details.inputs_first)) {
        return transformer_block_by_operators(x, w, heads, dropout, details);
    }
    require_lengths("transformer_block", details.lengths, x.size(0), x.size(1));
    return Fused<FusedBlock>::of(FusedBlock(heads, details), inputs_of(x.contiguous(), w));
}

}  // namespace microbatch
