// The kernels in vectors of 16 floats, compiled for avx512 (see CMakeLists.txt).
#include <math.h>

#include "microbatch/ops/kernels/kernels.h"

namespace microbatch {
namespace {
#include "microbatch/ops/kernels/all.inl"
}  // namespace

extern const Kernels avx512_kernels;
const Kernels avx512_kernels = all_of_them("avx512");

}  // namespace microbatch
