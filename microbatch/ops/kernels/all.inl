// All kernels for the vectors that this is compiled for: the vectors first, of which the others are made, and the tiles
// before what is made of them.
#include "microbatch/ops/kernels/vector.inl"
// After the vectors.
#include "microbatch/ops/kernels/gated.inl"
#include "microbatch/ops/kernels/gelu.inl"
#include "microbatch/ops/kernels/group_norm.inl"
#include "microbatch/ops/kernels/norm.inl"
#include "microbatch/ops/kernels/rotary.inl"
#include "microbatch/ops/kernels/tile.inl"
// After the tiles.
#include "microbatch/ops/kernels/attention.inl"

constexpr Kernels all_of_them(const char* name, const ExactKernels* exact) {
    return {.name = name,
            .exact = exact,
            .gelu = gelu,
            .gelu_backward = gelu_backward,
            .gelu_rows = gelu_rows,
            .gelu_rows_backward = gelu_rows_backward,
            .add_rows = add_rows,
            .gated = gated,
            .gated_backward = gated_backward,
            .rms_norm_rows = rms_norm_rows,
            .rms_norm_rows_backward = rms_norm_rows_backward,
            .rotate_rows = rotate_rows,
            .rotate_rows_backward = rotate_rows_backward,
            .norm_rows = norm_rows,
            .norm_rows_backward = norm_rows_backward,
            .sum_columns = sum_columns,
            .group_norm_scratch = group_norm_scratch,
            .group_norm_images = group_norm_images,
            .group_norm_images_again = group_norm_images_again,
            .group_norm_images_backward = group_norm_images_backward,
            .attention_forward_scratch = attention_forward_scratch,
            .attention_forward = attention_forward,
            .attention_backward_scratch = attention_backward_scratch,
            .attention_backward = attention_backward};
}
