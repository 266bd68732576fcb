// The kernels in vectors of 4 floats.
#include <math.h>

#include "microbatch/nn/kernels/kernels.h"

namespace microbatch {
namespace {
#include "microbatch/nn/kernels/vector.inl"
// After the vectors, which the others are made of.
#include "microbatch/nn/kernels/gelu.inl"
#include "microbatch/nn/kernels/norm.inl"
#include "microbatch/nn/kernels/tile.inl"
// After the tiles.
#include "microbatch/nn/kernels/attention.inl"
}  // namespace

extern const Kernels generic_kernels;
const Kernels generic_kernels = {.name = "generic",
                                 .gelu = gelu,
                                 .gelu_backward = gelu_backward,
                                 .gelu_rows = gelu_rows,
                                 .gelu_rows_backward = gelu_rows_backward,
                                 .add_rows = add_rows,
                                 .norm_rows = norm_rows,
                                 .norm_rows_backward = norm_rows_backward,
                                 .sum_columns = sum_columns,
                                 .attention_forward_scratch = attention_forward_scratch,
                                 .attention_forward = attention_forward,
                                 .attention_backward_scratch = attention_backward_scratch,
                                 .attention_backward = attention_backward};

}  // namespace microbatch
