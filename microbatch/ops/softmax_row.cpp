#include "microbatch/ops/softmax_row.h"

#include <algorithm>
#include <array>
#include <bit>
#include <limits>

#include "microbatch/core/clones.h"

namespace microbatch {
namespace {

// As many numbers as keep the core's vectors busy.
constexpr std::int64_t width = 32;

// exp(x) = 2^n exp(r), |r| <= ln 2 / 2, for x <= 0; coefficients from Moshier's Cephes, expf.
[[gnu::always_inline]] inline float exponential(float x) {
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
    const float power = std::bit_cast<float>((std::bit_cast<std::uint32_t>(shifted) + 127U) << 23U);
    return x < -87.0F ? 0.0F : p * power;
}

[[gnu::always_inline]] inline float largest_of(const float* row, std::int64_t count) {
    std::array<float, width> tops;
    tops.fill(-std::numeric_limits<float>::infinity());
    std::int64_t i = 0;
    for (; i + width <= count; i += width) {
        for (std::int64_t j = 0; j < width; ++j) tops[j] = row[i + j] > tops[j] ? row[i + j] : tops[j];
    }
    float top = *std::max_element(tops.begin(), tops.end());
    for (; i < count; ++i) top = row[i] > top ? row[i] : top;
    return top;
}

}  // namespace

MICROBATCH_CLONES Exponentials exponentiate_row(float* row, std::int64_t count) {
    constexpr std::int64_t block = 64 * width;  // sums of more would lose digits in float
    const float largest = largest_of(row, count);
    double sum = 0.0;
    for (std::int64_t first = 0; first < count; first += block) {
        const std::int64_t end = std::min(first + block, count);
        std::array<float, width> sums{};
        std::int64_t i = first;
        for (; i + width <= end; i += width) {
            for (std::int64_t j = 0; j < width; ++j) {
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

MICROBATCH_CLONES void scale_row(float* row, std::int64_t count, float factor) {
    for (std::int64_t i = 0; i < count; ++i) row[i] *= factor;
}

}  // namespace microbatch
