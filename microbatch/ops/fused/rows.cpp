#include "microbatch/ops/fused/rows.h"

#include "microbatch/runtime/gemm.h"

namespace microbatch {

void linear(RowRange rows, const Columns& x, const at::Tensor& weight, const Columns& y, bool add) {
    const std::int64_t outputs = weight.size(0), inputs = weight.size(1);
    const bool outputs_first = weight.is_contiguous();
    const MatrixView matrix{floats(weight), outputs_first ? inputs : outputs, /*transposed=*/outputs_first};
    gemm(rows.count(), outputs, inputs, {x.at(rows.begin), x.row}, matrix, y.at(rows.begin), y.row, add);
}

void linear_gradient(RowRange rows, const Columns& gradient, const at::Tensor& weight, const Columns& grad_x,
                     bool add) {
    const std::int64_t outputs = weight.size(0), inputs = weight.size(1);
    const bool outputs_first = weight.is_contiguous();
    const MatrixView matrix{floats(weight), outputs_first ? inputs : outputs, /*transposed=*/!outputs_first};
    gemm(rows.count(), inputs, outputs, {gradient.at(rows.begin), gradient.row}, matrix, grad_x.at(rows.begin),
         grad_x.row, add);
}

void repeat_bias(RowRange rows, const at::Tensor& bias, const Columns& y) {
    for (std::int64_t row = rows.begin; row < rows.end; ++row) std::copy_n(floats(bias), bias.numel(), y.at(row));
}

void add_rows(RowRange rows, const at::Tensor& x, const at::Tensor& added, const at::Tensor& bias,
              const at::Tensor& sum) {
    const std::int64_t width = bias.numel(), begin = rows.begin * width;
    kernels().add_rows({.rows = rows.count(),
                        .width = width,
                        .x = floats(x) + begin,
                        .added = floats(added) + begin,
                        .bias = floats(bias),
                        .sum = mutable_floats(sum) + begin});
}

at::Tensor RowTotals::total() const {
    float* const first = mutable_floats(all_);
    for (std::int64_t thread = 1; thread < all_.size(0); ++thread) {
        for (std::int64_t i = 0; i < count_; ++i) first[i] += first[thread * 2 * count_ + i];
    }
    return all_.select(0, 0).select(0, 0);
}

void add_product(const at::Tensor& left, const at::Tensor& right, at::Tensor& sum) {
    const std::int64_t rows = left.size(0), outputs = left.size(1), inputs = right.size(1);
    const float *grad_y = floats(left), *x = floats(right);
    float* const to = mutable_floats(sum);
    in_parallel(outputs, worth_a_thread / (rows * inputs) + 1, [&](std::int64_t begin, std::int64_t end) {
        gemm(end - begin, inputs, rows, {grad_y + begin, left.stride(0), /*transposed=*/true}, {x, right.stride(0)},
             to + begin * inputs, inputs, /*add=*/true);
    });
}

}  // namespace microbatch
