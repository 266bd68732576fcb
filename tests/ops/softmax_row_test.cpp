#include "microbatch/ops/softmax_row.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

namespace microbatch {
namespace {

TEST(SoftmaxRow, EqualsTheExponentialsInFp64ForEveryLength) {
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

TEST(SoftmaxRow, TakesMinusInfinityForZero) {
    std::vector<float> row(100, 1e30F);
    row[3] = -std::numeric_limits<float>::infinity();
    row[99] = -1e30F;
    EXPECT_EQ(exponentiate_row(row.data(), 100).sum, 98.0);
    EXPECT_EQ(row[3], 0.0F);
    EXPECT_EQ(row[99], 0.0F);
    EXPECT_EQ(row[4], 1.0F);
}

TEST(SoftmaxRow, PassesOnWhatIsNotFinite) {
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

}  // namespace
}  // namespace microbatch
