#include "microbatch/core/noise_scale.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "support/errors.h"

namespace microbatch {
namespace {

using test::expect_usage_error;
using Vector = std::vector<double>;

constexpr double nan_value = std::numeric_limits<double>::quiet_NaN();

double squared(const Vector& v) {
    double sum = 0;
    for (const double x : v) sum += x * x;
    return sum;
}

/// Gradients of single samples: normal about a known mean, with a known deviation in each direction.
class Stream {
public:
    explicit Stream(double gradient) : mean_(8), deviation_(8) {
        for (std::size_t i = 0; i < mean_.size(); ++i) {
            mean_[i] = gradient * (i % 2 == 0 ? 1.0 : -0.5);
            deviation_[i] = 0.5 + 0.25 * static_cast<double>(i);
        }
    }

    double squared_gradient() const { return squared(mean_); }
    double variance() const { return squared(deviation_); }

    /// A batch in micro-batches of these sizes.
    std::optional<NoiseMeasure> measure(const std::vector<int>& sizes) {
        NoiseSums parts;
        Vector sum(mean_.size(), 0.0);
        double weight = 0;
        for (const int size : sizes) {
            Vector part(mean_.size(), 0.0);
            for (int sample = 0; sample < size; ++sample) {
                for (std::size_t i = 0; i < part.size(); ++i) part[i] += mean_[i] + deviation_[i] * normal_(random_);
            }
            for (std::size_t i = 0; i < part.size(); ++i) sum[i] += part[i];
            for (double& x : part) x /= std::max(size, 1);
            parts.add({static_cast<double>(size), squared(part)});
            weight += size;
        }
        for (double& x : sum) x /= weight;
        return measure_noise(parts, squared(sum));
    }

private:
    Vector mean_, deviation_;
    std::mt19937_64 random_{7};
    std::normal_distribution<double> normal_;
};

TEST(NoiseScale, IsUnbiasedWhateverTheMicroBatches) {
    for (const std::vector<int>& sizes : {std::vector{4, 4, 4, 4}, {1, 1}, {16, 3}, {7, 1, 2, 5, 1}, {8, 8, 8, 0, 3}}) {
        Stream stream(3.0);
        NoiseMeasure sum;
        constexpr int draws = 10'000;
        for (int i = 0; i < draws; ++i) {
            const NoiseMeasure one = stream.measure(sizes).value();
            sum.variance += one.variance / draws;
            sum.squared_gradient += one.squared_gradient / draws;
        }
        // The estimates' own deviation is 0.3 to 0.7 % of either.
        EXPECT_NEAR(sum.variance / stream.variance(), 1, 0.01);
        EXPECT_NEAR(sum.squared_gradient / stream.squared_gradient(), 1, 0.01);
    }
}

TEST(NoiseScale, TheAverageOfManyBatchesIsTheRatioOfTheMeans) {
    Stream stream(0.3);
    NoiseAverage average(0.999);
    for (int i = 0; i < 10'000; ++i) average.add(stream.measure({8, 8, 5}).value());
    // The last thousand measures: their gradient is hidden in noise of twenty times its size.
    EXPECT_NEAR(*average.noise_batch() / (stream.variance() / stream.squared_gradient()), 1, 0.1);
}

TEST(NoiseScale, TheFirstMeasureIsTheMeanOfOne) {
    NoiseAverage average;
    EXPECT_FALSE(average.mean());
    EXPECT_FALSE(average.noise_batch());
    average.add({.variance = 12, .squared_gradient = 3});
    EXPECT_DOUBLE_EQ(average.mean()->variance, 12);
    EXPECT_DOUBLE_EQ(average.mean()->squared_gradient, 3);
    EXPECT_DOUBLE_EQ(*average.noise_batch(), 4);
    average.add({.variance = 0, .squared_gradient = 3});
    // 0.95 of the first to 1 of the second.
    EXPECT_DOUBLE_EQ(average.mean()->variance, 12 * 0.95 / 1.95);
}

NoiseSums sums_of(std::initializer_list<MicroBatchGradient> parts) {
    NoiseSums sums;
    for (const MicroBatchGradient& part : parts) sums.add(part);
    return sums;
}

TEST(NoiseScale, IsUndefinedWhereNothingCanBeSaid) {
    const MicroBatchGradient one{4, 2.0};
    EXPECT_FALSE(measure_noise({}, 1.0));
    EXPECT_FALSE(measure_noise(sums_of({one}), 2.0));
    EXPECT_FALSE(measure_noise(sums_of({one, {0, 0}}), 2.0));
    EXPECT_FALSE(measure_noise(sums_of({one, {4, nan_value}}), 2.0));
    EXPECT_FALSE(measure_noise(sums_of({one, one}), std::numeric_limits<double>::infinity()));
}

TEST(NoiseScale, AGradientThatTheNoiseHidesHasNoBatch) {
    NoiseAverage average;
    average.add({.variance = 10, .squared_gradient = -0.1});
    EXPECT_FALSE(average.noise_batch());
    average.add({.variance = 10, .squared_gradient = 1});
    EXPECT_TRUE(average.noise_batch());
    NoiseAverage without;
    without.add({.variance = 0, .squared_gradient = 1});
    EXPECT_FALSE(without.noise_batch());
}

TEST(NoiseScale, EqualGradientsHaveNoNoise) {
    const NoiseMeasure measure = measure_noise(sums_of({{4, 9.0}, {2, 9.0}, {1, 9.0}}), 9.0).value();
    EXPECT_DOUBLE_EQ(measure.variance, 0);
    EXPECT_DOUBLE_EQ(measure.squared_gradient, 9);
}

TEST(NoiseScale, RefusesADecayThatForgetsNothing) {
    for (const double decay : {1.0, -0.1, nan_value}) {
        expect_usage_error({"decay of the noise"}, [decay] { NoiseAverage average(decay); });
    }
}

TEST(NoiseAverage, ContinuesFromItsStateToTheSameBits) {
    std::mt19937_64 random(3);
    std::normal_distribution<double> normal;
    NoiseAverage average(0.9), twin(0.9);
    for (int i = 0; i < 200; ++i) {
        NoiseAverage fresh(0.9);
        fresh.add({.variance = 1e9, .squared_gradient = 1e9});
        fresh.restore(average.state());
        average = fresh;
        EXPECT_EQ(average.noise_batch(), twin.noise_batch());
        EXPECT_EQ(average.mean().has_value(), i > 0);
        if (i > 0) {
            EXPECT_EQ(average.mean()->variance, twin.mean()->variance);
            EXPECT_EQ(average.mean()->squared_gradient, twin.mean()->squared_gradient);
        }
        const NoiseMeasure measure{.variance = 2 + normal(random), .squared_gradient = 1 + normal(random)};
        average.add(measure);
        twin.add(measure);
    }
}

TEST(NoiseAverage, RefusesAStateThatNoneCouldHaveAndKeepsItsOwn) {
    NoiseAverage average;
    average.add({.variance = 2, .squared_gradient = 1});
    const double infinity = std::numeric_limits<double>::infinity();
    const NoiseAverage::State good = average.state();
    const auto refused = [&](const NoiseAverage::State& state) {
        expect_usage_error({"noise"}, [&] { average.restore(state); });
        EXPECT_EQ(average.state().weight, good.weight);
        EXPECT_EQ(average.noise_batch(), 2.0);
    };
    for (const double bad : {nan_value, infinity, -infinity}) {
        refused({bad, good.sum});
        refused({good.weight, {.variance = bad, .squared_gradient = 1}});
        refused({good.weight, {.variance = 1, .squared_gradient = bad}});
    }
    refused({-0.1, good.sum});
    refused({1.1, good.sum});
}

}  // namespace
}  // namespace microbatch
