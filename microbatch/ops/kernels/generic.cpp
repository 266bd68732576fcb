// The kernels in vectors of 4 floats.
#include <math.h>

#include "microbatch/ops/kernels/kernels.h"

namespace microbatch {
namespace {
#include "microbatch/ops/kernels/all.inl"
}  // namespace

extern const Kernels generic_kernels;
const Kernels generic_kernels = all_of_them("generic");

}  // namespace microbatch
