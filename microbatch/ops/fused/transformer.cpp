#include "microbatch/ops/fused/transformer.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "microbatch/ops/fused/rms_norm_rows.h"
#include "microbatch/ops/fused/rows.h"

namespace microbatch {

namespace {

/// One of the two norms, a layer norm or, without a shift, an RMS norm: its parameters and saved statistics.
struct Norm {
    const at::Tensor& scale;
    const at::Tensor& shift;
    double epsilon;
    float* means;
    float* inverses;

    Norm(const at::Tensor& scale_, const at::Tensor& shift_, double epsilon_, const at::Tensor& statistics,
         std::int64_t number)
        : scale(scale_),
          shift(shift_),
          epsilon(epsilon_),
          means(mutable_floats(statistics) + 2 * number * statistics.size(1)),
          inverses(means + statistics.size(1)) {}

    RmsNorm rms() const { return {scale, epsilon, inverses}; }

    void forward(RowRange rows, const at::Tensor& x, const at::Tensor& y) const {
        if (!shift.defined()) return rms().forward(rows, x, y);
        const std::int64_t width = scale.numel(), begin = rows.begin * width;
        kernels().norm_rows({.rows = rows.count(),
                             .width = width,
                             .epsilon = static_cast<float>(epsilon),
                             .x = floats(x) + begin,
                             .scale = floats(scale),
                             .shift = floats(shift),
                             .y = mutable_floats(y) + begin,
                             .means = means + rows.begin,
                             .inverses = inverses + rows.begin});
    }

    /// Replaces the gradient of y by that of x plus the residual's, and computes y again.
    void backward(RowRange rows, const at::Tensor& x, const at::Tensor& gradient, const at::Tensor& residual,
                  const at::Tensor& y, float* grad_scale, float* grad_shift, float* grad_x_sums) const {
        const std::int64_t width = scale.numel(), begin = rows.begin * width;
        if (!shift.defined()) {
            rms().backward(rows, x, {gradient, gradient, residual, y, grad_scale});
            sum_rows(rows, gradient, width, grad_x_sums);
            return;
        }
        kernels().norm_rows_backward({.rows = rows.count(),
                                      .width = width,
                                      .x = floats(x) + begin,
                                      .means = means + rows.begin,
                                      .inverses = inverses + rows.begin,
                                      .scale = floats(scale),
                                      .shift = floats(shift),
                                      .gradient = floats(gradient) + begin,
                                      .residual = floats(residual) + begin,
                                      .grad_x = mutable_floats(gradient) + begin,
                                      .y = mutable_floats(y) + begin,
                                      .grad_scale = grad_scale,
                                      .grad_shift = grad_shift,
                                      .grad_x_sums = grad_x_sums});
    }
};

/// Positions in the block's weights: the shifts, which RMS norms lack, are the last.
enum Place : std::size_t {
    attention_norm_scale,
    qkv_weight,
    qkv_bias,
    projection_weight,
    projection_bias,
    mlp_norm_scale,
    expansion_weight,
    expansion_bias,
    contraction_weight,
    contraction_bias,
    attention_norm_shift,
    mlp_norm_shift
};

/// From the block's result back to attention: the gradients of the residual stream in between and of attention's
/// output.
struct MlpGradients {
    at::Tensor grad_middle, grad_attended;
};

MlpGradients mlp_backward(const Rows& rows, const TransformerWeights& w, const TransformerDetails& details,
                          const TransformerSaved& saved, const at::Tensor& gradient, const GradientSink& sink) {
    const std::int64_t width = rows.width, inner = saved.expanded.size(1);
    const Norm norm(w.mlp_norm_scale, w.mlp_norm_shift, details.epsilon, saved.statistics, 1);
    MlpGradients result{at::empty_like(saved.middle), at::empty_like(saved.middle)};
    const at::Tensor grad_expanded = rows.matrix(inner), activated = rows.matrix(inner), normed = rows.matrix(width);
    RowTotals grad_vectors(inner + 4 * width);
    rows.in_threads([&](RowRange mine) {
        linear_gradient(mine, gradient, w.contraction_weight, grad_expanded);
        grad_vectors.of(mine, [&](RowRange some, float* sums) {
            const std::int64_t begin = some.begin * inner;
            kernels().gelu_rows_backward(some.count(), inner, floats(saved.expanded) + begin,
                                         mutable_floats(grad_expanded) + begin, mutable_floats(activated) + begin,
                                         sums);
            sum_rows(some, gradient, width, sums + inner);
        });
        linear_gradient(mine, grad_expanded, w.expansion_weight, result.grad_middle);
        grad_vectors.of(mine, [&](RowRange some, float* sums) {
            float* const own = sums + inner + width;
            norm.backward(some, saved.middle, result.grad_middle, gradient, normed, own, own + width, own + 2 * width);
        });
        linear_gradient(mine, result.grad_middle, w.projection_weight, result.grad_attended);
    });
    const at::Tensor sums = grad_vectors.total();
    const auto vector = [&](std::int64_t number) { return sums.narrow(0, inner + number * width, width); };
    sink(contraction_weight, gradient.view({rows.count, width}), activated);
    sink(contraction_bias, vector(0), {});
    sink(expansion_weight, grad_expanded, normed);
    sink(expansion_bias, sums.narrow(0, 0, inner), {});
    sink(mlp_norm_scale, vector(1), {});
    if (w.mlp_norm_shift.defined()) sink(mlp_norm_shift, vector(2), {});
    sink(projection_weight, result.grad_middle.view({rows.count, width}), saved.attended.out.view({rows.count, width}));
    sink(projection_bias, vector(3), {});
    return result;
}

/// From the gradient of queries, keys and values to that of the block's input.
at::Tensor qkv_backward(const Rows& rows, const at::Tensor& x, const TransformerWeights& w,
                        const TransformerDetails& details, const TransformerSaved& saved, const at::Tensor& grad_qkv,
                        const at::Tensor& grad_middle, const GradientSink& sink) {
    const std::int64_t width = rows.width;
    const Norm norm(w.attention_norm_scale, w.attention_norm_shift, details.epsilon, saved.statistics, 0);
    at::Tensor grad_x = at::empty_like(x);
    const at::Tensor normed = rows.matrix(width);
    RowTotals grad_vectors(6 * width);
    rows.in_threads([&](RowRange mine) {
        linear_gradient(mine, grad_qkv, w.qkv_weight, grad_x);
        grad_vectors.of(mine, [&](RowRange some, float* sums) {
            sum_rows(some, grad_qkv, 3 * width, sums);
            float* const own = sums + 3 * width;
            norm.backward(some, x, grad_x, grad_middle, normed, own, own + width, own + 2 * width);
        });
    });
    const at::Tensor sums = grad_vectors.total();
    sink(qkv_weight, grad_qkv.view({rows.count, 3 * width}), normed);
    sink(qkv_bias, sums.narrow(0, 0, 3 * width), {});
    sink(attention_norm_scale, sums.narrow(0, 3 * width, width), {});
    if (w.attention_norm_shift.defined()) sink(attention_norm_shift, sums.narrow(0, 4 * width, width), {});
    return grad_x;
}

}  // namespace

std::pair<at::Tensor, TransformerSaved> transformer_forward(const at::Tensor& x, const TransformerWeights& w,
                                                            std::int64_t heads, const TransformerDetails& details) {
    const Rows rows(x);
    const std::int64_t inner = w.expansion_bias.numel();
    at::Tensor out = at::empty_like(x);
    TransformerSaved saved{.qkv = at::empty({x.size(0), x.size(1), 3 * rows.width}, x.options()),
                           .attended = {},
                           .middle = at::empty_like(x),
                           .expanded = rows.matrix(inner),
                           .statistics = at::empty({4, rows.count}, x.options())};
    const Norm first(w.attention_norm_scale, w.attention_norm_shift, details.epsilon, saved.statistics, 0);
    const Norm second(w.mlp_norm_scale, w.mlp_norm_shift, details.epsilon, saved.statistics, 1);
    const at::Tensor& normed = out;  // until `out` holds the result
    rows.in_threads([&](RowRange mine) {
        first.forward(mine, x, normed);
        repeat_bias(mine, w.qkv_bias, saved.qkv);
        linear(mine, normed, w.qkv_weight, saved.qkv, /*add=*/true);
    });
    saved.attended = attend(interleaved(saved.qkv, heads, details.lengths));
    const at::Tensor activated = rows.matrix(inner);
    rows.in_threads([&](RowRange mine) {
        linear(mine, saved.attended.out, w.projection_weight, saved.middle, /*add=*/false);
        add_rows(mine, x, saved.middle, w.projection_bias, saved.middle);
        second.forward(mine, saved.middle, normed);
        linear(mine, normed, w.expansion_weight, saved.expanded, /*add=*/false);
        const std::int64_t begin = mine.begin * inner;
        kernels().gelu_rows(mine.count(), inner, floats(w.expansion_bias), mutable_floats(saved.expanded) + begin,
                            mutable_floats(activated) + begin);
        linear(mine, activated, w.contraction_weight, out, /*add=*/false);
        add_rows(mine, saved.middle, out, w.contraction_bias, out);
    });
    return {out, saved};
}

at::Tensor transformer_backward(const at::Tensor& x, const TransformerWeights& w, std::int64_t heads,
                                const TransformerDetails& details, const TransformerSaved& saved,
                                const at::Tensor& gradient, const GradientSink& sink) {
    const Rows rows(x);
    auto [grad_middle, grad_attended] = mlp_backward(rows, w, details, saved, gradient, sink);
    const at::Tensor grad_qkv = at::empty_like(saved.qkv);
    attention_gradient(interleaved(saved.qkv, heads, details.lengths), saved.attended, grad_attended,
                       interleaved(grad_qkv, heads));
    grad_attended.reset();
    return qkv_backward(rows, x, w, details, saved, grad_qkv, grad_middle, sink);
}

}  // namespace microbatch
