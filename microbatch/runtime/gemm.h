#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace microbatch {

/// at::mm(x, matrix), or at::addmm(bias, x, matrix), with the one of torch's two libraries (MKL, oneDNN) that is faster
/// for these shapes on this type of processor. The same shapes always use the same library; nothing is timed. Not
/// differentiable.
///
/// Shapes: x [rows, inputs], matrix [inputs, outputs], bias as for at::addmm -> [rows, outputs].
/// Errors: torch's own.
/// Cost:   oneDNN needs scratch memory, whose size does not grow with the rows.
at::Tensor gemm(const at::Tensor& x, const at::Tensor& matrix, const std::optional<at::Tensor>& bias = {});

/// True if gemm() uses oneDNN for many rows and a matrix of this many numbers on this processor.
bool prefers_onednn(std::int64_t numbers);

/// A row-major fp32 matrix in the caller's memory, or its transpose.
struct MatrixView {
    const float* values;
    std::int64_t row;         ///< numbers from one row to the next in memory
    bool transposed = false;  ///< the operand is the transpose
};

/// c = a b, or c += a b with `add`, with the library that torch uses, in the calling thread.
///
/// Shapes: a [rows, depth], b [depth, columns], c [rows, columns], c_row numbers from one row to the next.
/// Errors: torch's own. MKL allocates nothing from torch's allocator, so it cannot run out of the budget.
void gemm(std::int64_t rows, std::int64_t columns, std::int64_t depth, MatrixView a, MatrixView b, float* c,
          std::int64_t c_row, bool add = false);

}  // namespace microbatch
