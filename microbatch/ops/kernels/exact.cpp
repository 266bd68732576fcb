// The exact kernels, compiled once for each kind of vector like those beside them.
#include "microbatch/ops/kernels/kernels.h"

namespace microbatch {
namespace {
#include "microbatch/ops/kernels/exact.inl"
}  // namespace

extern const ExactKernels MICROBATCH_EXACT;
const ExactKernels MICROBATCH_EXACT = {.adamw = adamw_of<float>,
                                       .adamw_double = adamw_of<double>,
                                       .sgd = sgd_of<float>,
                                       .sgd_double = sgd_of<double>,
                                       .sum_of_squares = sum_of_squares_of<float>,
                                       .sum_of_squares_double = sum_of_squares_of<double>,
                                       .add_rounded = add_rounded_of<float>,
                                       .add_rounded_double = add_rounded_of<double>,
                                       .exponentiate_row = exponentiate_row,
                                       .scale_row = scale_row};

}  // namespace microbatch
