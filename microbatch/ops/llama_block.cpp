#include "microbatch/ops/llama_block.h"

#include <ATen/autocast_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/silu.h>

#include <algorithm>
#include <tuple>
#include <utility>

#include "microbatch/autograd/fused.h"
#include "microbatch/autograd/in_place_gradients.h"
#include "microbatch/autograd/sum_in_place.h"
#include "microbatch/ops/causal_attention.h"
#include "microbatch/ops/checks.h"
#include "microbatch/ops/fused/llama.h"
#include "microbatch/ops/rms_norm.h"

namespace microbatch {

namespace {

/// The inputs of FusedLlama: x, and the weights in their order, without biases that are undefined.
variable_list inputs_of(const at::Tensor& x, const LlamaWeights& w) {
    variable_list inputs{x,
                         w.attention_norm_scale,
                         w.q_weight,
                         w.k_weight,
                         w.v_weight,
                         w.projection_weight,
                         w.mlp_norm_scale,
                         w.gate_weight,
                         w.expansion_weight,
                         w.contraction_weight};
    if (w.q_bias.defined()) inputs.insert(inputs.end(), {w.q_bias, w.k_bias, w.v_bias});
    return inputs;
}

LlamaWeights weights_of(const variable_list& v) {
    LlamaWeights weights{v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9]};
    if (v.size() > 10) std::tie(weights.q_bias, weights.k_bias, weights.v_bias) = std::tie(v[10], v[11], v[12]);
    return weights;
}

class FusedLlama {
public:
    FusedLlama(at::Tensor cosines, at::Tensor sines, LlamaDetails details)
        : cosines_(std::move(cosines)), sines_(std::move(sines)), details_(std::move(details)) {}

    FusedResult forward(const variable_list& inputs) const {
        auto [out, saved] = llama_forward(inputs[0], cosines_, sines_, weights_of(inputs), details_);
        return {out,
                {saved.qkv, saved.attended.out, saved.attended.log_sums, saved.middle, saved.gate, saved.up,
                 saved.statistics}};
    }

    variable_list backward(const FusedBackward& of) const {
        variable_list results(of.inputs.size());
        const GradientSink sink = weight_sink(of, results, in_place_);
        const auto& s = of.saved;
        results[0] = llama_backward(of.inputs[0], cosines_, sines_, weights_of(of.inputs), details_,
                                    {s[0], {s[1], s[2]}, s[3], s[4], s[5], s[6]}, of.gradient.contiguous(), sink);
        return results;
    }

    at::Tensor by_operators(const variable_list& inputs) const {
        return llama_block_by_operators(inputs[0], cosines_, sines_, weights_of(inputs), details_);
    }

private:
    at::Tensor cosines_, sines_;
    LlamaDetails details_;
    bool in_place_ = InPlaceGradients::active();
};

/// True if the fused version supports these shapes and types; otherwise torch's operators report what is wrong.
bool is_fast(const at::Tensor& x, const at::Tensor& cosines, const at::Tensor& sines, const LlamaWeights& w,
             const LlamaDetails& details) {
    const variable_list inputs = inputs_of(x, w);
    const auto is_ours = [](const at::Tensor& one) { return is_fp32_on_cpu(one) && one.is_contiguous(); };
    if (!is_fp32_on_cpu(x) || x.dim() != 3 || x.numel() == 0 || operators_are_watched() ||
        at::autocast::is_autocast_enabled(at::kCPU) || details.heads < 1 || details.kv_heads < 1 ||
        details.heads % details.kv_heads != 0 || !w.q_weight.defined() || w.q_weight.dim() != 2 ||
        w.q_weight.size(0) % (2 * details.heads) != 0 || !w.gate_weight.defined() || w.gate_weight.dim() != 2 ||
        !std::all_of(inputs.begin() + 1, inputs.end(), [&](const at::Tensor& one) { return is_ours(one); })) {
        return false;
    }
    const std::int64_t width = x.size(2), q = w.q_weight.size(0), size = q / details.heads;
    const std::int64_t kv = details.kv_heads * size, inner = w.gate_weight.size(0);
    const auto has = [](const at::Tensor& one, at::IntArrayRef sizes) { return one.defined() && one.sizes() == sizes; };
    const auto turns = [&](const at::Tensor& one) {
        return is_fp32_on_cpu(one) && !one.requires_grad() && one.dim() == 3 && one.size(1) == x.size(1) &&
               one.size(2) == size && (one.size(0) == 1 || one.size(0) == x.size(0));
    };
    const bool biased = has(w.q_bias, {q}) && has(w.k_bias, {kv}) && has(w.v_bias, {kv});
    const bool unbiased = !w.q_bias.defined() && !w.k_bias.defined() && !w.v_bias.defined();
    return (biased || unbiased) && turns(cosines) && turns(sines) && inner >= 1 &&
           has(w.attention_norm_scale, {width}) && has(w.mlp_norm_scale, {width}) && has(w.q_weight, {q, width}) &&
           has(w.k_weight, {kv, width}) && has(w.v_weight, {kv, width}) && has(w.projection_weight, {width, q}) &&
           has(w.gate_weight, {inner, width}) && has(w.expansion_weight, {inner, width}) &&
           has(w.contraction_weight, {width, inner});
}

at::Tensor rows_of_positions(const at::Tensor& one, const at::Tensor& x) {
    return one.expand({x.size(0), one.size(1), one.size(2)}).contiguous();
}

at::Tensor rotated(const at::Tensor& x, std::int64_t heads, const at::Tensor& cosines, const at::Tensor& sines) {
    const at::Tensor apart = x.view({x.size(0), x.size(1), heads, x.size(2) / heads});
    const std::int64_t half = apart.size(3) / 2;
    const at::Tensor turned = at::cat({apart.narrow(3, half, half).neg(), apart.narrow(3, 0, half)}, 3);
    const at::Tensor sum = apart * cosines.unsqueeze(2) + turned * sines.unsqueeze(2);
    return sum.to(x.scalar_type()).flatten(2);  // under autocast, the cosines have a wider type
}

}  // namespace

at::Tensor llama_block_by_operators(const at::Tensor& x, const at::Tensor& cosines, const at::Tensor& sines,
                                    const LlamaWeights& w, const LlamaDetails& details) {
    const auto norm = [&](const at::Tensor& rows, const at::Tensor& scale) {
        return rms_norm_by_operators(rows, scale, details.epsilon);
    };
    const auto linear = [&](const at::Tensor& rows, const at::Tensor& weight, const at::Tensor& bias) {
        const at::Tensor flat = rows.flatten(0, -2);
        const at::Tensor y = bias.defined() ? at::addmm(bias, flat, weight.t()) : at::mm(flat, weight.t());
        return y.view({x.size(0), x.size(1), weight.size(0)});
    };
    const at::Tensor n = norm(x, w.attention_norm_scale);
    const at::Tensor q = rotated(linear(n, w.q_weight, w.q_bias), details.heads, cosines, sines);
    const at::Tensor k = rotated(linear(n, w.k_weight, w.k_bias), details.kv_heads, cosines, sines);
    const at::Tensor v = linear(n, w.v_weight, w.v_bias);
    const at::Tensor attended = attention(q, k, v, details.heads, details.kv_heads, /*causal=*/true, details.lengths);
    const at::Tensor middle = x + linear(attended, w.projection_weight, {});
    const at::Tensor normed = norm(middle, w.mlp_norm_scale);
    const at::Tensor gated = at::silu(linear(normed, w.gate_weight, {})) * linear(normed, w.expansion_weight, {});
    return middle + linear(gated, w.contraction_weight, {});
}

at::Tensor llama_block(const at::Tensor& x, const at::Tensor& cosines, const at::Tensor& sines, const LlamaWeights& w,
                       const LlamaDetails& details) {
    if (!is_fast(x, cosines, sines, w, details)) return llama_block_by_operators(x, cosines, sines, w, details);
    require_lengths("llama_block", details.lengths, x.size(0), x.size(1));
    return Fused<FusedLlama>::of({rows_of_positions(cosines, x), rows_of_positions(sines, x), details},
                                 inputs_of(x.contiguous(), w));
}

}  // namespace microbatch
