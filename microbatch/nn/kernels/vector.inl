// Vectors of floats of the width that this file is compiled for. GCC and Clang write them as one number.
// No #pragma once and nothing of the standard library: each variant of the kernels has these for itself, and a function
// that two variants shared could end up in the program with the instructions of the wider one.
#include <stdint.h>

#if defined(__AVX512F__)
#define MICROBATCH_LANES 16
#elif defined(__AVX2__)
#define MICROBATCH_LANES 8
#else
#define MICROBATCH_LANES 4
#endif

constexpr int64_t lanes = MICROBATCH_LANES;

typedef float Vector __attribute__((vector_size(4 * MICROBATCH_LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * MICROBATCH_LANES)));
// In memory, wherever it begins, and whatever else is kept there as floats.
typedef float Unaligned __attribute__((vector_size(4 * MICROBATCH_LANES), aligned(4), may_alias));

inline Vector load(const float* from) {
    return *reinterpret_cast<const Unaligned*>(from);
}

inline void store(float* to, Vector values) {
    *reinterpret_cast<Unaligned*>(to) = values;
}

inline Vector splat(float value) {
    return Vector{} + value;
}

inline Vector smaller(Vector left, Vector right) {
    return left < right ? left : right;
}

// NaN in `values` stays.
inline Vector at_least(Vector values, float least) {
    return values < splat(least) ? splat(least) : values;
}

inline Vector at_most(Vector values, float most) {
    return values > splat(most) ? splat(most) : values;
}

inline float sum_of(Vector values) {
    float sum = 0;
    for (int i = 0; i < lanes; ++i) sum += values[i];
    return sum;
}

inline int64_t round_up(int64_t count, int64_t multiple) {
    return (count + multiple - 1) / multiple * multiple;
}

// e^x to 2 units in the last place from -87 to 88, constant beyond; NaN stays.
// x = n ln 2 + r with |r| <= ln 2 / 2: e^r by the polynomial of Cephes' expf, 2^n by the exponent bits.
inline Vector exp(Vector x) {
    x = at_most(at_least(x, -87.0F), 88.0F);
    const Vector magic = splat(12582912.0F);  // 1.5 * 2^23: what is added to it is rounded to an integer
    const Vector shifted = x * 1.44269504F + magic;
    const Vector n = shifted - magic;
    const Vector r = (x - n * 0.693359375F) + n * 2.12194440e-4F;
    Vector p = splat(1.9875691500e-4F);
    p = p * r + 1.3981999507e-3F;
    p = p * r + 8.3334519073e-3F;
    p = p * r + 4.1665795894e-2F;
    p = p * r + 1.6666665459e-1F;
    p = p * r + 5.0000001201e-1F;
    p = p * (r * r) + r + 1.0F;
    const Integers power = (reinterpret_cast<Integers>(shifted) + (127 - 0x4B400000)) << 23;
    return p * reinterpret_cast<Vector>(power);
}
