// The kernels that give the same bits for every vector width, with every width that this processor supports.
#include "microbatch/ops/kernels/kernels.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

namespace microbatch {
namespace {

template <class Number>
std::vector<Number> drawn(std::size_t count, std::uint64_t seed) {
    std::mt19937_64 random(seed);
    std::normal_distribution<double> normal;
    std::vector<Number> result(count);
    for (Number& each : result) each = static_cast<Number>(normal(random) * std::exp(4 * normal(random)));
    return result;
}

template <class Number>
void expect_same_bits(const std::vector<Number>& left, const std::vector<Number>& right) {
    EXPECT_TRUE(left.empty() || std::memcmp(left.data(), right.data(), left.size() * sizeof(Number)) == 0);
}

/// A parameter with its gradient and what an optimizer keeps.
template <class Number>
struct Stretch {
    std::vector<Number> parameter, gradient, first, second;

    explicit Stretch(std::size_t count)
        : parameter(drawn<Number>(count, 1)),
          gradient(drawn<Number>(count, 2)),
          first(drawn<Number>(count, 3)),
          second(drawn<Number>(count, 4)) {
        for (Number& each : second) each = std::abs(each);
    }

    UpdateArrays<Number> arrays(bool momentum = true) {
        return {parameter.data(), gradient.data(), momentum ? first.data() : nullptr, second.data(),
                static_cast<std::int64_t>(parameter.size())};
    }
};

// The arithmetic of the loops, rounded after every operation, however the compiler optimizes this file.
template <class Number>
Number rounded(Number x) {
    volatile Number result = x;
    return result;
}

template <class Number>
void expect_adamw(void (*adamw)(const AdamWUpdate&, const UpdateArrays<Number>&), std::size_t count) {
    const AdamWUpdate how{.beta1 = 0.9,
                          .beta2 = 0.999,
                          .epsilon = 1e-8,
                          .kept = 0.9999,
                          .length = 0.01,
                          .correction = 31.6,
                          .divisor = 37.3};
    const auto number = [](double x) { return static_cast<Number>(x); };
    Stretch<Number> one(count), other(count);
    adamw(how, one.arrays());
    for (std::size_t i = 0; i < count; ++i) {
        const Number g = other.gradient[i] / number(how.divisor);
        Number &p = other.parameter[i], &m = other.first[i], &v = other.second[i];
        m = m + rounded(number(1 - how.beta1) * rounded(g - m));
        v = rounded(number(how.beta2) * v) + rounded(rounded(number(1 - how.beta2) * g) * g);
        p = rounded(number(how.kept) * p) -
            rounded(number(how.length) * m) / (rounded(std::sqrt(v) * number(how.correction)) + number(how.epsilon));
    }
    expect_same_bits(one.parameter, other.parameter);
    expect_same_bits(one.first, other.first);
    expect_same_bits(one.second, other.second);
}

template <class Number>
void expect_sgd(void (*sgd)(const SgdUpdate&, const UpdateArrays<Number>&), std::size_t count) {
    for (const auto& [momentum, nesterov] : {std::pair{false, false}, {true, false}, {true, true}}) {
        const SgdUpdate how{
            .learning_rate = 0.1, .momentum = 0.9, .nesterov = nesterov, .kept = 0.999, .decay = 0.01, .divisor = 3.7};
        const auto number = [](double x) { return static_cast<Number>(x); };
        Stretch<Number> one(count), other(count);
        sgd(how, one.arrays(momentum));
        for (std::size_t i = 0; i < count; ++i) {
            Number &p = other.parameter[i], &v = other.first[i];
            const Number g = other.gradient[i] / number(how.divisor) + rounded(number(how.decay) * p);
            if (momentum) v = rounded(number(how.momentum) * v) + g;
            const Number ahead = nesterov ? g + rounded(number(how.momentum) * v) : v;
            p = rounded(number(how.kept) * p) - rounded(number(how.learning_rate) * (momentum ? ahead : g));
        }
        expect_same_bits(one.parameter, other.parameter);
        expect_same_bits(one.first, other.first);
    }
}

TEST(ExactKernels, UpdatesRoundAfterEveryOperationForEveryLength) {
    for (const Kernels* kernels : all_kernels()) {
        SCOPED_TRACE(kernels->name);
        for (const std::size_t count : {0U, 1U, 7U, 16U, 33U, 1001U}) {
            expect_adamw(kernels->exact->adamw, count);
            expect_adamw(kernels->exact->adamw_double, count);
            expect_sgd(kernels->exact->sgd, count);
            expect_sgd(kernels->exact->sgd_double, count);
        }
    }
}

TEST(ExactKernels, SumsAndSoftmaxHaveTheSameBitsForEveryKindOfVector) {
    const ExactKernels& first = *all_kernels().front()->exact;
    for (const Kernels* kernels : all_kernels()) {
        SCOPED_TRACE(kernels->name);
        for (const std::size_t size : {0U, 1U, 15U, 16U, 31U, 33U, 2049U, 50257U}) {
            const auto count = static_cast<std::int64_t>(size);
            const std::vector<float> numbers = drawn<float>(size, 5);
            const std::vector<double> doubles = drawn<double>(size, 6);
            EXPECT_EQ(kernels->exact->sum_of_squares(numbers.data(), count),
                      first.sum_of_squares(numbers.data(), count));
            EXPECT_EQ(kernels->exact->sum_of_squares_double(doubles.data(), count),
                      first.sum_of_squares_double(doubles.data(), count));
            std::vector<float> one = numbers, other = numbers;
            const Exponentials sums = kernels->exact->exponentiate_row(one.data(), count);
            const Exponentials expected = first.exponentiate_row(other.data(), count);
            EXPECT_EQ(sums.sum, expected.sum);
            EXPECT_EQ(sums.largest, expected.largest);
            expect_same_bits(one, other);
        }
    }
}

class SoftmaxRow : public testing::TestWithParam<const Kernels*> {
protected:
    static Exponentials exponentiate_row(float* row, std::int64_t count) {
        return GetParam()->exact->exponentiate_row(row, count);
    }
    static void scale_row(float* row, std::int64_t count, float factor) {
        GetParam()->exact->scale_row(row, count, factor);
    }
};
INSTANTIATE_TEST_SUITE_P(Vectors, SoftmaxRow, testing::ValuesIn(all_kernels()),
                         [](const auto& one) { return one.param->name; });

TEST_P(SoftmaxRow, EqualsTheExponentialsInFp64ForEveryLength) {
    std::mt19937 random(1);
    for (const double spread : {0.1, 3.0, 40.0}) {
        std::normal_distribution<float> draw(5.0F, static_cast<float>(spread));
        for (const std::int64_t count : {1, 2, 31, 32, 33, 64, 2047, 2048, 2049, 50257}) {
            std::vector<float> logits(count);
            for (float& each : logits) each = draw(random);
            std::vector<float> row = logits;
            const auto [largest, sum] = exponentiate_row(row.data(), count);
            EXPECT_EQ(largest, *std::max_element(logits.begin(), logits.end()));
            double expected_sum = 0.0;
            for (std::int64_t i = 0; i < count; ++i) {
                const double expected = std::exp(static_cast<double>(logits[i] - largest));
                // Two units in the last place, and what is flushed to 0: exp(-87).
                EXPECT_NEAR(row[i], expected, 2.4e-7 * expected + 1.7e-38);
                expected_sum += expected;
            }
            // The same two units, and 64 additions in float for each of a block's lanes.
            EXPECT_NEAR(sum / expected_sum, 1.0, 66 * 6e-8);
            const std::vector<float> before = row;
            scale_row(row.data(), count, 0.3F);
            for (std::int64_t i = 0; i < count; ++i) EXPECT_EQ(row[i], before[i] * 0.3F);
        }
    }
}

TEST_P(SoftmaxRow, TreatsMinusInfinityAsZero) {
    std::vector<float> row(100, 1e30F);
    row[3] = -std::numeric_limits<float>::infinity();
    row[99] = -1e30F;
    EXPECT_EQ(exponentiate_row(row.data(), 100).sum, 98.0);
    EXPECT_EQ(row[3], 0.0F);
    EXPECT_EQ(row[99], 0.0F);
    EXPECT_EQ(row[4], 1.0F);
}

TEST_P(SoftmaxRow, PassesOnWhatIsNotFinite) {
    const float infinity = std::numeric_limits<float>::infinity();
    for (const std::size_t place : {0U, 40U, 99U}) {
        for (const float bad : {infinity, std::numeric_limits<float>::quiet_NaN()}) {
            std::vector<float> row(100, 1.0F);
            row[place] = bad;
            EXPECT_TRUE(std::isnan(exponentiate_row(row.data(), 100).sum)) << place << ' ' << bad;
        }
    }
    std::vector<float> row(100, -infinity);
    EXPECT_TRUE(std::isnan(exponentiate_row(row.data(), 100).sum));
}

template <class Number>
void expect_add_rounded(double (*add)(const Number*, double*, std::int64_t, double), std::size_t count) {
    const std::vector<Number> numbers = drawn<Number>(count, 5);
    const double quantum = std::ldexp(1.0, -20), shift = std::ldexp(1.5, 32);
    std::vector<double> sums(count, 0.25), expected(count);
    double largest = 0.0;
    for (std::size_t i = 0; i < count; ++i) {
        expected[i] = 0.25 + std::nearbyint(static_cast<double>(numbers[i]) / quantum) * quantum;
        largest = std::max(largest, std::abs(static_cast<double>(numbers[i])));
    }
    EXPECT_EQ(add(numbers.data(), sums.data(), static_cast<std::int64_t>(count), shift), largest);
    expect_same_bits(sums, expected);
}

TEST(ExactKernels, RoundToAQuantumAndAdd) {
    for (const Kernels* one : all_kernels()) {
        for (const std::size_t count : {0, 1, 7, 16, 33, 1000}) {
            expect_add_rounded(one->exact->add_rounded, count);
            expect_add_rounded(one->exact->add_rounded_double, count);
        }
        const float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
        const std::vector<float> numbers{1.0F, nan, -infinity, -3.0F};
        std::vector<double> sums(4, 0.0);
        EXPECT_EQ(one->exact->add_rounded(numbers.data(), sums.data(), 4, std::ldexp(1.5, 32)), infinity);
        EXPECT_TRUE(sums[0] == 1.0 && std::isnan(sums[1]) && sums[2] == -infinity && sums[3] == -3.0);
    }
}

}  // namespace
}  // namespace microbatch
