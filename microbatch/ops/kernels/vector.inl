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

// Minus 0 is nothing to compute, not even for -0; plus 0 would be.
inline Vector splat(float value) {
    return value - Vector{};
}

// NaN in `values` stays.
inline Vector at_least(Vector values, float least) {
    return values < splat(least) ? splat(least) : values;
}

inline Vector at_most(Vector values, float most) {
    return values > splat(most) ? splat(most) : values;
}

// Four at a time: a chain of additions would be as long as the vector.
inline float sum_of(Vector values) {
    typedef float Four __attribute__((vector_size(16)));
    Four parts[lanes / 4];
    __builtin_memcpy(parts, &values, sizeof(parts));
    Four sum = parts[0];
    for (int i = 1; i < lanes / 4; ++i) sum += parts[i];
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

inline int64_t round_up(int64_t count, int64_t multiple) {
    return (count + multiple - 1) / multiple * multiple;
}

// The last few elements in a vector of their own.
template <class Function>
inline void for_each_vector(int64_t count, const Function& function) {
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes) function(i, lanes);
    if (i < count) function(i, count - i);
}

inline Vector load_some(const float* from, int64_t count) {
    if (count == lanes) return load(from);
    Vector values{};
    for (int64_t i = 0; i < count; ++i) values[i] = from[i];
    return values;
}

inline void store_some(float* to, Vector values, int64_t count) {
    if (count == lanes) {
        store(to, values);
    } else {
        for (int64_t i = 0; i < count; ++i) to[i] = values[i];
    }
}

// e^x to 2 units in the last place from -87 to 88, any number beyond; NaN stays.
// x = n ln 2 + r with |r| <= ln 2 / 2: e^r by the polynomial of Cephes' expf, 2^n by the exponent bits.
inline Vector exp(Vector x) {
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
