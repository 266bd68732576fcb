#include "microbatch/ops/fused/llama.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <tuple>

#include "microbatch/ops/fused/rms_norm_rows.h"
#include "microbatch/ops/fused/rows.h"

namespace microbatch {

namespace {

RmsNorm attention_norm(const LlamaWeights& w, const LlamaDetails& details, const LlamaSaved& saved) {
    return {w.attention_norm_scale, details.epsilon, mutable_floats(saved.statistics)};
}

RmsNorm mlp_norm(const LlamaWeights& w, const LlamaDetails& details, const LlamaSaved& saved) {
    return {w.mlp_norm_scale, details.epsilon, mutable_floats(saved.statistics) + saved.statistics.size(1)};
}

/// Where queries, keys and values lie in a tensor of all of them.
struct Heads3 {
    std::int64_t heads, kv_heads, size;

    Heads3(const LlamaWeights& w, const LlamaDetails& details)
        : heads(details.heads), kv_heads(details.kv_heads), size(w.q_weight.size(0) / details.heads) {}

    std::int64_t q() const { return heads * size; }
    std::int64_t kv() const { return kv_heads * size; }
    std::int64_t all() const { return q() + 2 * kv(); }

    AttentionInputs of(const at::Tensor& qkv, const at::Tensor& lengths) const {
        return {.q = qkv.narrow(2, 0, q()),
                .k = qkv.narrow(2, q(), kv()),
                .v = qkv.narrow(2, q() + kv(), kv()),
                .heads = heads,
                .kv_heads = kv_heads,
                .lengths = lengths};
    }

    /// Queries and keys, which lie side by side, for kernels().rotate_rows.
    RotateRows rotation(RowRange rows, const at::Tensor& qkv, const at::Tensor& cosines,
                        const at::Tensor& sines) const {
        return {.rows = rows.count(),
                .heads = heads + kv_heads,
                .size = size,
                .row = all(),
                .cosines = floats(cosines) + rows.begin * size,
                .sines = floats(sines) + rows.begin * size,
                .values = mutable_floats(qkv) + rows.begin * all()};
    }
};

/// Positions in LlamaWeights.
enum LlamaPlace : std::size_t {
    llama_attention_norm,
    llama_q,
    llama_k,
    llama_v,
    llama_projection,
    llama_mlp_norm,
    llama_gate,
    llama_expansion,
    llama_contraction,
    llama_q_bias,
    llama_k_bias,
    llama_v_bias
};

void add_residual(RowRange rows, const at::Tensor& x, const at::Tensor& sum) {
    const std::int64_t width = x.size(-1);
    const float* const from = floats(x);
    float* const to = mutable_floats(sum);
    for (std::int64_t i = rows.begin * width; i < rows.end * width; ++i) to[i] += from[i];
}

void project(RowRange rows, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, const Columns& y) {
    if (bias.defined()) repeat_bias(rows, bias, y);
    linear(rows, x, weight, y, /*add=*/bias.defined());
}

/// From the block's result back to attention.
struct GatedGradients {
    at::Tensor grad_middle, grad_attended;
};

GatedGradients gated_mlp_backward(const Rows& rows, const LlamaWeights& w, const LlamaDetails& details,
                                  const LlamaSaved& saved, const at::Tensor& gradient, const GradientSink& sink) {
    const std::int64_t width = rows.width, inner = saved.gate.size(1);
    const RmsNorm norm = mlp_norm(w, details, saved);
    GatedGradients result{at::empty_like(saved.middle), at::empty_like(saved.attended.out)};
    const at::Tensor grad_gate = rows.matrix(inner), grad_up = rows.matrix(inner), product = rows.matrix(inner);
    const at::Tensor normed = rows.matrix(width);
    RowTotals grad_scale(width);
    rows.in_threads([&](RowRange mine) {
        linear_gradient(mine, gradient, w.contraction_weight, grad_up);
        const std::int64_t begin = mine.begin * inner;
        kernels().gated_backward(floats(saved.gate) + begin, floats(saved.up) + begin, floats(grad_up) + begin,
                                 mutable_floats(grad_gate) + begin, mutable_floats(grad_up) + begin,
                                 mutable_floats(product) + begin, mine.count() * inner);
        linear_gradient(mine, grad_gate, w.gate_weight, result.grad_middle);
        linear_gradient(mine, grad_up, w.expansion_weight, result.grad_middle, /*add=*/true);
        grad_scale.of(mine, [&](RowRange some, float* sums) {
            norm.backward(some, saved.middle, {result.grad_middle, result.grad_middle, gradient, normed, sums});
        });
        linear_gradient(mine, result.grad_middle, w.projection_weight, result.grad_attended);
    });
    sink(llama_contraction, gradient.view({rows.count, width}), product);
    sink(llama_gate, grad_gate, normed);
    sink(llama_expansion, grad_up, normed);
    sink(llama_mlp_norm, grad_scale.total(), {});
    sink(llama_projection, result.grad_middle.view({rows.count, width}), saved.attended.out.flatten(0, 1));
    return result;
}

/// From the gradient of queries, keys and values, still rotated, to that of the block's input.
at::Tensor projections_backward(const Rows& rows, const at::Tensor& x, const at::Tensor& cosines,
                                const at::Tensor& sines, const LlamaWeights& w, const LlamaDetails& details,
                                const LlamaSaved& saved, const at::Tensor& grad_qkv, const at::Tensor& grad_middle,
                                const GradientSink& sink) {
    const Heads3 heads(w, details);
    const std::int64_t width = rows.width, all = heads.all();
    const RmsNorm norm = attention_norm(w, details, saved);
    at::Tensor grad_x = at::empty_like(x);
    const at::Tensor normed = rows.matrix(width);
    RowTotals grad_vectors(all + width);
    rows.in_threads([&](RowRange mine) {
        kernels().rotate_rows_backward(heads.rotation(mine, grad_qkv, cosines, sines));
        linear_gradient(mine, {grad_qkv, 0, heads.q()}, w.q_weight, grad_x);
        linear_gradient(mine, {grad_qkv, heads.q(), heads.kv()}, w.k_weight, grad_x, /*add=*/true);
        linear_gradient(mine, {grad_qkv, heads.q() + heads.kv(), heads.kv()}, w.v_weight, grad_x, /*add=*/true);
        grad_vectors.of(mine, [&](RowRange some, float* sums) {
            if (w.q_bias.defined()) sum_rows(some, grad_qkv, all, sums);
            norm.backward(some, x, {grad_x, grad_x, grad_middle, normed, sums + all});
        });
    });
    const at::Tensor sums = grad_vectors.total(), matrix = grad_qkv.flatten(0, 1);
    std::int64_t first = 0;
    for (const auto& [weight, bias, columns] : {std::tuple{llama_q, llama_q_bias, heads.q()},
                                                {llama_k, llama_k_bias, heads.kv()},
                                                {llama_v, llama_v_bias, heads.kv()}}) {
        sink(weight, matrix.narrow(1, first, columns), normed);
        if (w.q_bias.defined()) sink(bias, sums.narrow(0, first, columns), {});
        first += columns;
    }
    sink(llama_attention_norm, sums.narrow(0, all, width), {});
    return grad_x;
}

}  // namespace

std::pair<at::Tensor, LlamaSaved> llama_forward(const at::Tensor& x, const at::Tensor& cosines, const at::Tensor& sines,
                                                const LlamaWeights& w, const LlamaDetails& details) {
    const Rows rows(x);
    const Heads3 heads(w, details);
    const std::int64_t inner = w.gate_weight.size(0);
    at::Tensor out = at::empty_like(x);
    LlamaSaved saved{.qkv = at::empty({x.size(0), x.size(1), heads.all()}, x.options()),
                     .attended = {},
                     .middle = at::empty_like(x),
                     .gate = rows.matrix(inner),
                     .up = rows.matrix(inner),
                     .statistics = at::empty({2, rows.count}, x.options())};
    const RmsNorm first = attention_norm(w, details, saved), second = mlp_norm(w, details, saved);
    const at::Tensor& normed = out;  // until `out` holds the result
    rows.in_threads([&](RowRange mine) {
        first.forward(mine, x, normed);
        project(mine, normed, w.q_weight, w.q_bias, {saved.qkv, 0, heads.q()});
        project(mine, normed, w.k_weight, w.k_bias, {saved.qkv, heads.q(), heads.kv()});
        project(mine, normed, w.v_weight, w.v_bias, {saved.qkv, heads.q() + heads.kv(), heads.kv()});
        kernels().rotate_rows(heads.rotation(mine, saved.qkv, cosines, sines));
    });
    saved.attended = attend(heads.of(saved.qkv, details.lengths));
    const at::Tensor product = rows.matrix(inner);
    rows.in_threads([&](RowRange mine) {
        linear(mine, saved.attended.out, w.projection_weight, saved.middle, /*add=*/false);
        add_residual(mine, x, saved.middle);
        second.forward(mine, saved.middle, normed);
        linear(mine, normed, w.gate_weight, saved.gate, /*add=*/false);
        linear(mine, normed, w.expansion_weight, saved.up, /*add=*/false);
        const std::int64_t begin = mine.begin * inner;
        kernels().gated(floats(saved.gate) + begin, floats(saved.up) + begin, mutable_floats(product) + begin,
                        mine.count() * inner);
        linear(mine, product, w.contraction_weight, out, /*add=*/false);
        add_residual(mine, saved.middle, out);
    });
    return {out, saved};
}

at::Tensor llama_backward(const at::Tensor& x, const at::Tensor& cosines, const at::Tensor& sines,
                          const LlamaWeights& w, const LlamaDetails& details, const LlamaSaved& saved,
                          const at::Tensor& gradient, const GradientSink& sink) {
    const Rows rows(x);
    auto [grad_middle, grad_attended] = gated_mlp_backward(rows, w, details, saved, gradient, sink);
    const Heads3 heads(w, details);
    const at::Tensor grad_qkv = at::empty_like(saved.qkv);
    attention_gradient(heads.of(saved.qkv, details.lengths), saved.attended, grad_attended, heads.of(grad_qkv, {}));
    grad_attended.reset();
    return projections_backward(rows, x, cosines, sines, w, details, saved, grad_qkv, grad_middle, sink);
}

}  // namespace microbatch
