#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace microbatch {

/// at::mm(x, matrix), or at::addmm(bias, x, matrix), by that of torch's two libraries for it (MKL, oneDNN) which is the
/// faster one for these shapes on this kind of processor. Same shapes and sizes: same library, always; nothing is
/// timed. No gradient.
///
/// Shapes: x [rows, inputs], matrix [inputs, outputs], bias as for at::addmm -> [rows, outputs].
/// Errors: torch's own.
/// Cost:   oneDNN needs scratch, of a size that does not grow with the rows.
at::Tensor gemm(const at::Tensor& x, const at::Tensor& matrix, const std::optional<at::Tensor>& bias = {});

/// Whether this gemm() is oneDNN's for many rows and a matrix of so many numbers, on this processor.
bool prefers_onednn(std::int64_t numbers);

/// A row-major fp32 matrix in memory of the caller's, or the transpose of one.
struct MatrixView {
    const float* values;
    std::int64_t row;         ///< numbers from one row to the next, as it lies in memory
    bool transposed = false;  ///< what is meant is the transpose
};

/// c = a b, or c += a b where `add`, of the library that torch multiplies with, in the calling thread.
///
/// Shapes: a [rows, depth], b [depth, columns], c [rows, columns], c_row numbers from one row to the next.
/// Errors: torch's own. With MKL none of memory: nothing is allocated from torch's allocator.
void gemm(std::int64_t rows, std::int64_t columns, std::int64_t depth, MatrixView a, MatrixView b, float* c,
          std::int64_t c_row, bool add = false);

}  // namespace microbatch
