#include "microbatch/ops/fused/transformer.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "microbatch/ops/kernels/kernels.h"
#include "microbatch/runtime/gemm.h"
#include "microbatch/runtime/parallel.h"

namespace microbatch {

namespace {

// Sums over rows are made of partial sums of this many: a long fp32 sum loses digits.
constexpr std::int64_t summed_rows = 32;

// Below this many multiplications a second thread does not pay.
constexpr std::int64_t worth_a_thread = std::int64_t{1} << 17;

const float* values(const at::Tensor& tensor) {
    return tensor.const_data_ptr<float>();
}

float* target(const at::Tensor& tensor) {
    return tensor.mutable_data_ptr<float>();
}

/// Rows [begin, end) that one thread works on.
struct Range {
    std::int64_t begin, end;

    std::int64_t count() const { return end - begin; }
};

/// y = x W^T, or += where `add`.
void linear(Range rows, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& y, bool add) {
    const std::int64_t outputs = weight.size(0), inputs = weight.size(1);
    gemm(rows.count(), outputs, inputs, {values(x) + rows.begin * inputs, inputs},
         {values(weight), inputs, /*transposed=*/true}, target(y) + rows.begin * outputs, outputs, add);
}

/// dx = dy W.
void linear_gradient(Range rows, const at::Tensor& gradient, const at::Tensor& weight, const at::Tensor& grad_x) {
    const std::int64_t outputs = weight.size(0), inputs = weight.size(1);
    gemm(rows.count(), inputs, outputs, {values(gradient) + rows.begin * outputs, outputs}, {values(weight), inputs},
         target(grad_x) + rows.begin * inputs, inputs);
}

void repeat_bias(Range rows, const at::Tensor& bias, const at::Tensor& y) {
    const std::int64_t width = bias.numel();
    const float* const from = values(bias);
    float* to = target(y) + rows.begin * width;
    for (std::int64_t row = 0; row < rows.count(); ++row, to += width) std::copy_n(from, width, to);
}

/// One of the two layer norms: its parameters and saved statistics.
struct Norm {
    const at::Tensor& scale;
    const at::Tensor& shift;
    float* means;
    float* inverses;

    Norm(const at::Tensor& scale_, const at::Tensor& shift_, const at::Tensor& statistics, std::int64_t number)
        : scale(scale_),
          shift(shift_),
          means(target(statistics) + 2 * number * statistics.size(1)),
          inverses(means + statistics.size(1)) {}

    void forward(Range rows, const at::Tensor& x, const at::Tensor& y) const {
        const std::int64_t width = scale.numel(), begin = rows.begin * width;
        kernels().norm_rows({.rows = rows.count(),
                             .width = width,
                             .epsilon = static_cast<float>(transformer_epsilon),
                             .x = values(x) + begin,
                             .scale = values(scale),
                             .shift = values(shift),
                             .y = target(y) + begin,
                             .means = means + rows.begin,
                             .inverses = inverses + rows.begin});
    }

    /// Replaces the gradient of y by that of x plus the residual's, and computes y again.
    void backward(Range rows, const at::Tensor& x, const at::Tensor& gradient, const at::Tensor& residual,
                  const at::Tensor& y, float* grad_scale, float* grad_shift, float* grad_x_sums) const {
        const std::int64_t width = scale.numel(), begin = rows.begin * width;
        kernels().norm_rows_backward({.rows = rows.count(),
                                      .width = width,
                                      .x = values(x) + begin,
                                      .means = means + rows.begin,
                                      .inverses = inverses + rows.begin,
                                      .scale = values(scale),
                                      .shift = values(shift),
                                      .gradient = values(gradient) + begin,
                                      .residual = values(residual) + begin,
                                      .grad_x = target(gradient) + begin,
                                      .y = target(y) + begin,
                                      .grad_scale = grad_scale,
                                      .grad_shift = grad_shift,
                                      .grad_x_sums = grad_x_sums});
    }
};

void add_rows(Range rows, const at::Tensor& x, const at::Tensor& added, const at::Tensor& bias, const at::Tensor& sum) {
    const std::int64_t width = bias.numel(), begin = rows.begin * width;
    kernels().add_rows({.rows = rows.count(),
                        .width = width,
                        .x = values(x) + begin,
                        .added = values(added) + begin,
                        .bias = values(bias),
                        .sum = target(sum) + begin});
}

/// Sums of a few vectors over all rows: per thread in its own memory, then added in the order of the threads.
class Sums {
public:
    explicit Sums(std::int64_t count)
        : count_(count), all_(at::zeros({thread_places(), 2, count}, at::TensorOptions(at::kFloat))) {}

    /// Calls add(rows, sums) for a few rows at a time, with sums of 0, and accumulates the results.
    template <class Add>
    void of(Range rows, const Add& add) {
        float* const total = target(all_) + at::get_thread_num() * 2 * count_;
        float* const some = total + count_;
        for (std::int64_t begin = rows.begin; begin < rows.end; begin += summed_rows) {
            std::fill_n(some, count_, 0.0F);
            add(Range{begin, std::min(begin + summed_rows, rows.end)}, some);
            for (std::int64_t i = 0; i < count_; ++i) total[i] += some[i];
        }
    }

    at::Tensor total() const {
        float* const first = target(all_);
        for (std::int64_t thread = 1; thread < all_.size(0); ++thread) {
            for (std::int64_t i = 0; i < count_; ++i) first[i] += first[thread * 2 * count_ + i];
        }
        return all_.select(0, 0).select(0, 0);
    }

private:
    std::int64_t count_;
    at::Tensor all_;
};

void sum_rows(Range rows, const at::Tensor& matrix, std::int64_t width, float* sums) {
    kernels().sum_columns(rows.count(), width, values(matrix) + rows.begin * width, sums);
}

/// The rows of a block and how threads share them.
struct Rows {
    std::int64_t count, width;

    explicit Rows(const at::Tensor& x) : count(x.size(0) * x.size(1)), width(x.size(2)) {}

    template <class Work>
    void in_threads(const Work& work) const {
        const std::int64_t grain = std::max<std::int64_t>(2, worth_a_thread / (width * width));
        in_parallel(count, grain, [&](std::int64_t begin, std::int64_t end) { work(Range{begin, end}); });
    }

    at::Tensor matrix(std::int64_t columns) const { return at::empty({count, columns}, at::kFloat); }
};

/// Positions in TransformerWeights.
enum Place : std::size_t {
    attention_norm_scale,
    attention_norm_shift,
    qkv_weight,
    qkv_bias,
    projection_weight,
    projection_bias,
    mlp_norm_scale,
    mlp_norm_shift,
    expansion_weight,
    expansion_bias,
    contraction_weight,
    contraction_bias
};

/// From the block's result back to attention: the gradients of the residual stream in between and of attention's
/// output.
struct MlpGradients {
    at::Tensor grad_middle, grad_attended;
};

MlpGradients mlp_backward(const Rows& rows, const TransformerWeights& w, const TransformerSaved& saved,
                          const at::Tensor& gradient, const GradientSink& sink) {
    const std::int64_t width = rows.width, inner = saved.expanded.size(1);
    const Norm norm(w.mlp_norm_scale, w.mlp_norm_shift, saved.statistics, 1);
    MlpGradients result{at::empty_like(saved.middle), at::empty_like(saved.middle)};
    const at::Tensor grad_expanded = rows.matrix(inner), activated = rows.matrix(inner), normed = rows.matrix(width);
    Sums grad_vectors(inner + 4 * width);
    rows.in_threads([&](Range mine) {
        linear_gradient(mine, gradient, w.contraction_weight, grad_expanded);
        grad_vectors.of(mine, [&](Range some, float* sums) {
            const std::int64_t begin = some.begin * inner;
            kernels().gelu_rows_backward(some.count(), inner, values(saved.expanded) + begin,
                                         target(grad_expanded) + begin, target(activated) + begin, sums);
            sum_rows(some, gradient, width, sums + inner);
        });
        linear_gradient(mine, grad_expanded, w.expansion_weight, result.grad_middle);
        grad_vectors.of(mine, [&](Range some, float* sums) {
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
    sink(mlp_norm_shift, vector(2), {});
    sink(projection_weight, result.grad_middle.view({rows.count, width}), saved.attended.out.view({rows.count, width}));
    sink(projection_bias, vector(3), {});
    return result;
}

/// From the gradient of queries, keys and values to that of the block's input.
at::Tensor qkv_backward(const Rows& rows, const at::Tensor& x, const TransformerWeights& w,
                        const TransformerSaved& saved, const at::Tensor& grad_qkv, const at::Tensor& grad_middle,
                        const GradientSink& sink) {
    const std::int64_t width = rows.width;
    const Norm norm(w.attention_norm_scale, w.attention_norm_shift, saved.statistics, 0);
    at::Tensor grad_x = at::empty_like(x);
    const at::Tensor normed = rows.matrix(width);
    Sums grad_vectors(6 * width);
    rows.in_threads([&](Range mine) {
        linear_gradient(mine, grad_qkv, w.qkv_weight, grad_x);
        grad_vectors.of(mine, [&](Range some, float* sums) {
            sum_rows(some, grad_qkv, 3 * width, sums);
            float* const own = sums + 3 * width;
            norm.backward(some, x, grad_x, grad_middle, normed, own, own + width, own + 2 * width);
        });
    });
    const at::Tensor sums = grad_vectors.total();
    sink(qkv_weight, grad_qkv.view({rows.count, 3 * width}), normed);
    sink(qkv_bias, sums.narrow(0, 0, 3 * width), {});
    sink(attention_norm_scale, sums.narrow(0, 3 * width, width), {});
    sink(attention_norm_shift, sums.narrow(0, 4 * width, width), {});
    return grad_x;
}

}  // namespace

std::pair<at::Tensor, TransformerSaved> transformer_forward(const at::Tensor& x, const TransformerWeights& w,
                                                            std::int64_t heads) {
    const Rows rows(x);
    const std::int64_t inner = w.expansion_bias.numel();
    at::Tensor out = at::empty_like(x);
    TransformerSaved saved{.qkv = at::empty({x.size(0), x.size(1), 3 * rows.width}, x.options()),
                           .attended = {},
                           .middle = at::empty_like(x),
                           .expanded = rows.matrix(inner),
                           .statistics = at::empty({4, rows.count}, x.options())};
    const Norm first(w.attention_norm_scale, w.attention_norm_shift, saved.statistics, 0);
    const Norm second(w.mlp_norm_scale, w.mlp_norm_shift, saved.statistics, 1);
    const at::Tensor& normed = out;  // until `out` holds the result
    rows.in_threads([&](Range mine) {
        first.forward(mine, x, normed);
        repeat_bias(mine, w.qkv_bias, saved.qkv);
        linear(mine, normed, w.qkv_weight, saved.qkv, /*add=*/true);
    });
    saved.attended = attend(saved.qkv, heads);
    const at::Tensor activated = rows.matrix(inner);
    rows.in_threads([&](Range mine) {
        linear(mine, saved.attended.out, w.projection_weight, saved.middle, /*add=*/false);
        add_rows(mine, x, saved.middle, w.projection_bias, saved.middle);
        second.forward(mine, saved.middle, normed);
        linear(mine, normed, w.expansion_weight, saved.expanded, /*add=*/false);
        const std::int64_t begin = mine.begin * inner;
        kernels().gelu_rows(mine.count(), inner, values(w.expansion_bias), target(saved.expanded) + begin,
                            target(activated) + begin);
        linear(mine, activated, w.contraction_weight, out, /*add=*/false);
        add_rows(mine, saved.middle, out, w.contraction_bias, out);
    });
    return {out, saved};
}

at::Tensor transformer_backward(const at::Tensor& x, const TransformerWeights& w, std::int64_t heads,
                                const TransformerSaved& saved, const at::Tensor& gradient, const GradientSink& sink) {
    const Rows rows(x);
    auto [grad_middle, grad_attended] = mlp_backward(rows, w, saved, gradient, sink);
    const at::Tensor grad_qkv = attention_gradient(saved.qkv, heads, saved.attended, grad_attended);
    grad_attended.reset();
    return qkv_backward(rows, x, w, saved, grad_qkv, grad_middle, sink);
}

void add_product(const at::Tensor& left, const at::Tensor& right, at::Tensor& sum) {
    const std::int64_t rows = left.size(0), outputs = left.size(1), inputs = right.size(1);
    const float *grad_y = values(left), *x = values(right);
    float* const to = target(sum);
    in_parallel(outputs, worth_a_thread / (rows * inputs) + 1, [&](std::int64_t begin, std::int64_t end) {
        gemm(end - begin, inputs, rows, {grad_y + begin, outputs, /*transposed=*/true}, {x, inputs},
             to + begin * inputs, inputs, /*add=*/true);
    });
}

}  // namespace microbatch
