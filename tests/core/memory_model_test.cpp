#include "microbatch/core/memory_model.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "support/errors.h"

namespace microbatch {
namespace {

using test::expect_usage_error;

constexpr std::int64_t largest = std::numeric_limits<std::int64_t>::max();
constexpr double infinity = std::numeric_limits<double>::infinity();

MemoryModel fit(const std::vector<MemoryPoint>& points) {
    return fit_memory(points);
}

TEST(MemoryModel, FindsAnAffineFunctionExactly) {
    // 3,000,000,007 + 12,345,679 b, at sizes whose mean is no integer.
    std::vector<MemoryPoint> points;
    for (const std::int64_t b : {1, 2, 4, 8, 13}) points.push_back({b, 3'000'000'007 + 12'345'679 * b});
    const MemoryModel model = fit_memory(points);
    EXPECT_EQ(model.fixed_bytes, 3'000'000'007.0);
    EXPECT_EQ(model.bytes_per_sample, 12'345'679.0);
    EXPECT_EQ(model.worst_relative_error, 0);
    EXPECT_EQ(model.predict(1'000), 3'000'000'007 + 12'345'679'000);
}

TEST(MemoryModel, IsTheLeastSquaresLineThroughScatteredPoints) {
    // By hand: x 1 2 3, y 10 14 12, means 2 and 12, slope (-1 * -2 + 0 + 1 * 0) / 2 = 1, offset 12 - 2 = 10.
    const MemoryModel model = fit({{1, 10}, {2, 14}, {3, 12}});
    EXPECT_EQ(model.bytes_per_sample, 1);
    EXPECT_EQ(model.fixed_bytes, 10);
    EXPECT_EQ(model.worst_relative_error, 2.0 / 14);  // residuals 1 of 10, -2 of 14, 1 of 12
}

TEST(MemoryModel, NoOtherLineHasSmallerSquaredErrors) {
    std::mt19937_64 random(1);
    std::normal_distribution<double> noise(0, 1e6);
    for (int trial = 0; trial < 100; ++trial) {
        std::vector<MemoryPoint> points;
        for (std::int64_t b = 1; b <= 32; b *= 2) {
            points.push_back({b, 500'000'000 + 10'000'000 * b + static_cast<std::int64_t>(noise(random))});
        }
        const MemoryModel model = fit_memory(points);
        const auto squared = [&](double fixed, double slope) {
            double sum = 0;
            for (const auto& point : points) {
                const double error =
                    fixed + slope * static_cast<double>(point.micro_batch) - static_cast<double>(point.peak_bytes);
                sum += error * error;
            }
            return sum;
        };
        const double best = squared(model.fixed_bytes, model.bytes_per_sample);
        for (const double sign : {-1.0, 1.0}) {
            EXPECT_LT(best, squared(model.fixed_bytes + sign * 1e4, model.bytes_per_sample));
            EXPECT_LT(best, squared(model.fixed_bytes, model.bytes_per_sample + sign * 1e3));
        }
    }
}

TEST(MemoryModel, AFallingPeakGivesTheLargestPeakForEverySize) {
    const MemoryModel model = fit({{1, 900}, {2, 1'000}, {4, 500}});
    EXPECT_EQ(model.bytes_per_sample, 0);
    EXPECT_EQ(model.fixed_bytes, 1'000);
    EXPECT_EQ(model.worst_relative_error, 1);  // 1,000 where 500 was measured
    EXPECT_EQ(model.predict(1), 1'000);
    EXPECT_EQ(model.predict(100), 1'000);
}

TEST(MemoryModel, RoundsPredictionsUpAndKeepsThemInRange) {
    EXPECT_EQ((MemoryModel{.fixed_bytes = 10.25, .bytes_per_sample = 0.5}).predict(1), 11);
    EXPECT_EQ((MemoryModel{.fixed_bytes = 10.5, .bytes_per_sample = 0.5}).predict(1), 11);
    EXPECT_EQ((MemoryModel{.fixed_bytes = -100, .bytes_per_sample = 20}).predict(2), 0);
    EXPECT_EQ((MemoryModel{.fixed_bytes = 0, .bytes_per_sample = 1e6}).predict(largest), largest);
    EXPECT_EQ((MemoryModel{.fixed_bytes = 0x1p63}).predict(1), largest);
    EXPECT_EQ((MemoryModel{.fixed_bytes = 1e300, .bytes_per_sample = 1e300}).predict(largest), largest);
}

TEST(MemoryModel, RefusesPointsThatDoNotMakeALine) {
    expect_usage_error({"measured at 0 points but not with two different micro-batch sizes"}, [] { fit({}); });
    expect_usage_error({"measured at 1 points"}, [] { fit({{4, 100}}); });
    expect_usage_error({"measured at 3 points"}, [] { fit({{4, 100}, {4, 101}, {4, 99}}); });
    expect_usage_error({"micro-batch 0 and 100 bytes"}, [] { fit({{0, 100}, {4, 101}}); });
    expect_usage_error({"micro-batch 4 and 0 bytes"}, [] { fit({{1, 100}, {4, 0}}); });
    expect_usage_error({"micro-batch 1 and -5 bytes"}, [] { fit({{1, -5}, {4, 7}}); });
}

TEST(MemoryModel, RefusesToPredictWithAModelOrSizeThatMeansNothing) {
    const double nan = std::nan("");
    for (const MemoryModel& model :
         {MemoryModel{.fixed_bytes = nan}, MemoryModel{.fixed_bytes = infinity}, MemoryModel{.bytes_per_sample = nan},
          MemoryModel{.bytes_per_sample = infinity}, MemoryModel{.bytes_per_sample = -1}}) {
        expect_usage_error({"a memory model of"}, [&] { static_cast<void>(model.predict(1)); });
        expect_usage_error({"a memory model of"}, [&] { largest_that_fits(model, 100, 10); });
    }
    expect_usage_error({"the micro-batch is 0 samples"}, [] { static_cast<void>(MemoryModel{}.predict(0)); });
}

TEST(MemoryModel, LargestThatFitsIsWhatALinearScanFinds) {
    std::mt19937_64 random(2);
    std::uniform_real_distribution<double> fixed(-100, 1'000);
    std::uniform_real_distribution<double> slope(0, 20);
    for (int trial = 0; trial < 2'000; ++trial) {
        const MemoryModel model{.fixed_bytes = fixed(random), .bytes_per_sample = trial % 10 == 0 ? 0 : slope(random)};
        const auto budget = static_cast<std::int64_t>(random() % 1'500);
        const auto most = static_cast<std::int64_t>(random() % 100);
        std::int64_t scanned = 0;
        while (scanned < most && model.predict(scanned + 1) <= budget) ++scanned;
        EXPECT_EQ(largest_that_fits(model, budget, most), scanned);
    }
}

TEST(MemoryModel, LargestThatFitsIsExactAtTheEdges) {
    const MemoryModel model{.fixed_bytes = 100, .bytes_per_sample = 7};
    EXPECT_EQ(largest_that_fits(model, 170, 1'000), 10);
    EXPECT_EQ(largest_that_fits(model, 169, 1'000), 9);
    EXPECT_EQ(largest_that_fits(model, 106, 1'000), 0);
    EXPECT_EQ(largest_that_fits(model, 107, 1'000), 1);
    EXPECT_EQ(largest_that_fits(model, 170, 4), 4);
    EXPECT_EQ(largest_that_fits(model, 170, 0), 0);
    EXPECT_EQ(largest_that_fits(model, -1, 1'000), 0);
    expect_usage_error({"at most -1 samples"}, [&] { largest_that_fits(model, 170, -1); });
}

TEST(MemoryModel, LargestThatFitsDoesNotOverflow) {
    EXPECT_EQ(largest_that_fits({.fixed_bytes = 0, .bytes_per_sample = 0}, 0, largest), largest);
    const MemoryModel one_each{.fixed_bytes = 0, .bytes_per_sample = 1};
    EXPECT_EQ(largest_that_fits(one_each, 1LL << 52U, largest), 1LL << 52U);
    // Above 2^53 neighbours share a double: still the last micro-batch whose own prediction fits.
    const std::int64_t fits = largest_that_fits(one_each, 1LL << 62U, largest);
    EXPECT_LE(one_each.predict(fits), 1LL << 62U);
    EXPECT_GT(one_each.predict(fits + 1), 1LL << 62U);
    EXPECT_EQ(largest_that_fits({.fixed_bytes = 0, .bytes_per_sample = 1e300}, largest - 1, largest), 0);
    EXPECT_EQ(largest_that_fits({.fixed_bytes = 0, .bytes_per_sample = 1e300}, largest, largest), largest);
}

}  // namespace
}  // namespace microbatch
