#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstdint>

#include "microbatch/ops/kernels/kernels.h"
#include "microbatch/runtime/parallel.h"

namespace microbatch {

/// What fused transformer blocks are made of: work on ranges of rows, in which a row stays with one thread. All tensors
/// are fp32 on the CPU.

/// RowTotals over rows are made of partial sums of this many: a long fp32 sum loses digits.
constexpr std::int64_t summed_rows = 32;

/// Below this many multiplications a second thread does not pay.
constexpr std::int64_t worth_a_thread = std::int64_t{1} << 17;

inline const float* floats(const at::Tensor& tensor) {
    return tensor.const_data_ptr<float>();
}

inline float* mutable_floats(const at::Tensor& tensor) {
    return tensor.mutable_data_ptr<float>();
}

/// Rows [begin, end) that one thread works on.
struct RowRange {
    std::int64_t begin, end;

    std::int64_t count() const { return end - begin; }
};

/// Some columns of a contiguous matrix: `columns` of `row`, the first one at `values`.
struct Columns {
    float* values;
    std::int64_t columns, row;

    /// All of a tensor whose last dimension is that of the rows.
    Columns(const at::Tensor& all) : values(mutable_floats(all)), columns(all.size(-1)), row(all.size(-1)) {}
    Columns(const at::Tensor& all, std::int64_t first, std::int64_t count)
        : values(mutable_floats(all) + first), columns(count), row(all.size(-1)) {}

    float* at(std::int64_t number) const { return values + number * row; }
};

/// y = x W^T, or += where `add`. W is [outputs, inputs], contiguous or the transpose of a contiguous matrix.
void linear(RowRange rows, const Columns& x, const at::Tensor& weight, const Columns& y, bool add);

/// dx = dy W, or +=.
void linear_gradient(RowRange rows, const Columns& gradient, const at::Tensor& weight, const Columns& grad_x,
                     bool add = false);

/// Writes the bias to every row.
void repeat_bias(RowRange rows, const at::Tensor& bias, const Columns& y);

/// sum = x + added + bias.
void add_rows(RowRange rows, const at::Tensor& x, const at::Tensor& added, const at::Tensor& bias,
              const at::Tensor& sum);

/// RowTotals of a few vectors over all rows: per thread in its own memory, then added in the order of the threads.
class RowTotals {
public:
    explicit RowTotals(std::int64_t count)
        : count_(count), all_(at::zeros({thread_places(), 2, count}, at::TensorOptions(at::kFloat))) {}

    /// Calls add(rows, sums) for a few rows at a time, with sums of 0, and accumulates the results.
    template <class Add>
    void of(RowRange rows, const Add& add) {
        float* const total = mutable_floats(all_) + at::get_thread_num() * 2 * count_;
        float* const some = total + count_;
        for (std::int64_t begin = rows.begin; begin < rows.end; begin += summed_rows) {
            std::fill_n(some, count_, 0.0F);
            add(RowRange{begin, std::min(begin + summed_rows, rows.end)}, some);
            for (std::int64_t i = 0; i < count_; ++i) total[i] += some[i];
        }
    }

    at::Tensor total() const;

private:
    std::int64_t count_;
    at::Tensor all_;
};

/// Adds the rows of a matrix to sums.
inline void sum_rows(RowRange rows, const at::Tensor& matrix, std::int64_t width, float* sums) {
    kernels().sum_columns(rows.count(), width, floats(matrix) + rows.begin * width, sums);
}

/// The rows of a block and how threads share them.
struct Rows {
    std::int64_t count, width;

    explicit Rows(const at::Tensor& x) : count(x.size(0) * x.size(1)), width(x.size(2)) {}

    template <class Work>
    void in_threads(const Work& work) const {
        const std::int64_t grain = std::max<std::int64_t>(2, worth_a_thread / (width * width));
        in_parallel(count, grain, [&](std::int64_t begin, std::int64_t end) { work(RowRange{begin, end}); });
    }

    at::Tensor matrix(std::int64_t columns) const { return at::empty({count, columns}, at::kFloat); }
};

/// sum += left^T right, with a contiguous sum [left's columns, right's columns] and factors whose rows have their numbers
/// side by side.
void add_product(const at::Tensor& left, const at::Tensor& right, at::Tensor& sum);

}  // namespace microbatch
