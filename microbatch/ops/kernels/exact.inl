// Loops whose bits are the same for every kind of vector: compiled without contraction, so that no product is left
// unrounded, and with sums in an order of their own. The compiler vectorises them.
// Nothing of the standard library, as in vector.inl.
#include <stdint.h>

inline float square_root(float x) {
    return __builtin_sqrtf(x);
}

inline double square_root(double x) {
    return __builtin_sqrt(x);
}

template <class Number>
inline void adamw_of(const AdamWUpdate& how, const UpdateArrays<Number>& arrays) {
    Number* __restrict p = arrays.parameter;
    const Number* __restrict gradient = arrays.gradient;
    Number* __restrict m = arrays.first;
    Number* __restrict v = arrays.second;
    const Number weight1 = static_cast<Number>(1.0 - how.beta1), weight2 = static_cast<Number>(1.0 - how.beta2);
    const Number beta2 = static_cast<Number>(how.beta2), epsilon = static_cast<Number>(how.epsilon);
    const Number kept = static_cast<Number>(how.kept), length = static_cast<Number>(how.length);
    const Number correction = static_cast<Number>(how.correction), divisor = static_cast<Number>(how.divisor);
    for (int64_t i = 0; i < arrays.count; ++i) {
        const Number g = gradient[i] / divisor;
        m[i] = m[i] + weight1 * (g - m[i]);
        v[i] = beta2 * v[i] + weight2 * g * g;
        p[i] = kept * p[i] - length * m[i] / (square_root(v[i]) * correction + epsilon);
    }
}

template <bool with_momentum, bool nesterov, class Number>
inline void sgd_loop(const SgdUpdate& how, const UpdateArrays<Number>& arrays) {
    Number* __restrict p = arrays.parameter;
    const Number* __restrict gradient = arrays.gradient;
    Number* __restrict v = arrays.first;
    const Number rate = static_cast<Number>(how.learning_rate), momentum = static_cast<Number>(how.momentum);
    const Number kept = static_cast<Number>(how.kept), decay = static_cast<Number>(how.decay);
    const Number divisor = static_cast<Number>(how.divisor);
    for (int64_t i = 0; i < arrays.count; ++i) {
        const Number g = gradient[i] / divisor + decay * p[i];
        Number step = g;
        if constexpr (with_momentum) {
            v[i] = momentum * v[i] + g;
            step = nesterov ? g + momentum * v[i] : v[i];
        }
        p[i] = kept * p[i] - rate * step;
    }
}

template <class Number>
inline void sgd_of(const SgdUpdate& how, const UpdateArrays<Number>& arrays) {
    if (arrays.first == nullptr) {
        sgd_loop<false, false>(how, arrays);
    } else if (how.nesterov) {
        sgd_loop<true, true>(how, arrays);
    } else {
        sgd_loop<true, false>(how, arrays);
    }
}

// Into as many sums as keep a core busy.
template <class Number>
inline double sum_of_squares_of(const Number* numbers, int64_t count) {
    constexpr int64_t width = 16;
    double sums[width] = {};
    int64_t i = 0;
    for (; i + width <= count; i += width) {
        for (int64_t j = 0; j < width; ++j) {
            const double number = numbers[i + j];
            sums[j] += number * number;
        }
    }
    for (int64_t j = 0; i + j < count; ++j) sums[j] += static_cast<double>(numbers[i + j]) * numbers[i + j];
    double all = 0.0;
    for (const double each : sums) all += each;
    return all;
}

// Adding and subtracting 1.5 * 2^52 quanta rounds to a multiple of the quantum. In two loops, each of one type.
template <class Number>
inline double add_rounded_of(const Number* __restrict numbers, double* __restrict sums, int64_t count, double shift) {
    constexpr int64_t width = 16;
    Number tops[width] = {};
    int64_t i = 0;
    for (; i + width <= count; i += width) {
        for (int64_t j = 0; j < width; ++j) sums[i + j] += (static_cast<double>(numbers[i + j]) + shift) - shift;
        for (int64_t j = 0; j < width; ++j) {
            const Number size = numbers[i + j] < 0 ? -numbers[i + j] : numbers[i + j];
            tops[j] = size > tops[j] ? size : tops[j];
        }
    }
    for (int64_t j = 0; i + j < count; ++j) {
        const Number size = numbers[i + j] < 0 ? -numbers[i + j] : numbers[i + j];
        tops[j] = size > tops[j] ? size : tops[j];
        sums[i + j] += (static_cast<double>(numbers[i + j]) + shift) - shift;
    }
    double top = 0.0;
    for (const Number each : tops) top = each > top ? each : top;
    return top;
}

// As many numbers as keep the core's vectors busy.
constexpr int64_t row_width = 32;

// exp(x) = 2^n exp(r), |r| <= ln 2 / 2, for x <= 0; coefficients from Moshier's Cephes, expf.
inline float exponential(float x) {
    constexpr float to_integer = 12582912.0F;  // 1.5 * 2^23: what is added to it is rounded to an integer
    const float shifted = x * 1.44269504F + to_integer;
    const float n = shifted - to_integer;
    const float r = (x - n * 0.693359375F) + n * 2.12194440e-4F;
    float p = 1.9875691500e-4F;
    p = p * r + 1.3981999507e-3F;
    p = p * r + 8.3334519073e-3F;
    p = p * r + 4.1665795894e-2F;
    p = p * r + 1.6666665459e-1F;
    p = p * r + 5.0000001201e-1F;
    p = p * r * r + r + 1.0F;
    const float power = __builtin_bit_cast(float, (__builtin_bit_cast(uint32_t, shifted) + 127U) << 23U);
    return x < -87.0F ? 0.0F : p * power;
}

inline float largest_of(const float* row, int64_t count) {
    float tops[row_width];
    for (float& top : tops) top = -__builtin_inff();
    int64_t i = 0;
    for (; i + row_width <= count; i += row_width) {
        for (int64_t j = 0; j < row_width; ++j) tops[j] = row[i + j] > tops[j] ? row[i + j] : tops[j];
    }
    float top = tops[0];
    for (int64_t j = 1; j < row_width; ++j) top = tops[j] > top ? tops[j] : top;
    for (; i < count; ++i) top = row[i] > top ? row[i] : top;
    return top;
}

Exponentials exponentiate_row(float* row, int64_t count) {
    constexpr int64_t block = 64 * row_width;  // sums of more would lose digits in float
    const float largest = largest_of(row, count);
    double sum = 0.0;
    for (int64_t first = 0; first < count; first += block) {
        const int64_t end = first + block < count ? first + block : count;
        float sums[row_width] = {};
        int64_t i = first;
        for (; i + row_width <= end; i += row_width) {
            for (int64_t j = 0; j < row_width; ++j) {
                row[i + j] = exponential(row[i + j] - largest);
                sums[j] += row[i + j];
            }
        }
        for (; i < end; ++i) {
            row[i] = exponential(row[i] - largest);
            sums[0] += row[i];
        }
        for (const float each : sums) sum += each;
    }
    return {largest, sum};
}

void scale_row(float* row, int64_t count, float factor) {
    for (int64_t i = 0; i < count; ++i) row[i] *= factor;
}
