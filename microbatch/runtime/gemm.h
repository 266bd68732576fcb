#pragma once

#include <cstdint>

namespace microbatch {

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
