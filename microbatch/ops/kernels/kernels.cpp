#include "microbatch/ops/kernels/kernels.h"

namespace microbatch {

extern const Kernels generic_kernels;  // vectors of 4: any processor
#if defined(MICROBATCH_X86_KERNELS)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

std::vector<const Kernels*> all_kernels() {
    std::vector<const Kernels*> result{&generic_kernels};
#if defined(MICROBATCH_X86_KERNELS)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) result.push_back(&avx2_kernels);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw")) {
        result.push_back(&avx512_kernels);
    }
#endif
    return result;
}

const Kernels& kernels() {
    static const Kernels& widest = *all_kernels().back();
    return widest;
}

}  // namespace microbatch
