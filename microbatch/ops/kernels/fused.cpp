// The kernels in vectors of one kind, with multiplications and additions fused: compiled once for each kind, under its
// name (see cmake/Kernels.cmake).
#include <math.h>

#include "microbatch/ops/kernels/kernels.h"

namespace microbatch {
namespace {
#include "microbatch/ops/kernels/all.inl"
}  // namespace

extern const ExactKernels MICROBATCH_EXACT;
extern const Kernels MICROBATCH_FUSED;
const Kernels MICROBATCH_FUSED = all_of_them(MICROBATCH_VECTORS, &MICROBATCH_EXACT);

}  // namespace microbatch
