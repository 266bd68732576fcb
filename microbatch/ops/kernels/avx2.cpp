// The kernels in vectors of 8 floats, compiled for avx2 (see CMakeLists.txt).
#include <math.h>

#include "microbatch/ops/kernels/kernels.h"

namespace microbatch {
namespace {
#include "microbatch/ops/kernels/all.inl"
}  // namespace

extern const Kernels avx2_kernels;
const Kernels avx2_kernels = all_of_them("avx2");

}  // namespace microbatch
