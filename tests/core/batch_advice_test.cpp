#include "microbatch/core/batch_advice.h"

#include <gtest/gtest.h>

#include <limits>
#include <random>

#include "support/errors.h"

namespace microbatch {
namespace {

using test::expect_usage_error;

constexpr std::int64_t most = std::numeric_limits<std::int64_t>::max();
const std::vector<TimedCut> even = {{1, 0.01}, {2, 0.01}, {4, 0.01}};

TEST(BatchAdvice, StepsAndSamplesAreThoseOfTheFormula) {
    const BatchAdvice advice = advise_batch(64.0, even, 0.0, 256, most);
    ASSERT_EQ(advice.table.size(), 9u);
    EXPECT_EQ(advice.table.back().batch, 256);
    for (const BatchCost& cost : advice.table) {
        const auto batch = static_cast<double>(cost.batch);
        // (S/S_min - 1)(E/E_min - 1) = 1
        EXPECT_NEAR((cost.steps - 1) * (cost.samples - 1), 1, 1e-12);
        EXPECT_DOUBLE_EQ(cost.steps, 1 + 64 / batch);
        if (cost.batch != 64) continue;
        EXPECT_DOUBLE_EQ(cost.steps, 2);
        EXPECT_DOUBLE_EQ(cost.samples, 2);
    }
}

TEST(BatchAdvice, FewIsATenthMoreThanTheFewest) {
    EXPECT_EQ(batch_of_few_steps(64.0), 640);
    EXPECT_EQ(batch_of_few_samples(64.0), 6);
    EXPECT_EQ(batch_of_few_samples(0.3), 1);
    EXPECT_EQ(batch_of_few_steps(0.01), 1);
    const BatchAdvice advice = advise_batch(64.0, even, 0.0, 1024, most);
    for (const BatchCost& cost : advice.table) {
        EXPECT_EQ(cost.steps <= 1.1, cost.batch >= batch_of_few_steps(64.0)) << cost.batch;
        EXPECT_EQ(cost.samples <= 1.1, cost.batch <= batch_of_few_samples(64.0)) << cost.batch;
    }
}

__extension__ using Wide = __int128;

// Whole numbers tell: with n = k / 2^20, steps 1 + n / B are at most 1.1 where 10 k <= 2^20 B.
TEST(BatchAdvice, FewIsExactlyATenthForEveryNoise) {
    EXPECT_EQ(batch_of_few_steps(1006.43), 10'065);
    std::mt19937_64 random(1);
    constexpr std::int64_t unit = 1 << 20;
    for (int i = 0; i < 100'000; ++i) {
        auto noise = static_cast<std::int64_t>(1 + (random() >> (12 + random() % 40)));
        if (i % 3 == 0) noise = noise / unit * unit + unit + i % 5 - 2;  // next to a whole number
        if (i % 3 == 1) noise = noise / 10 * 10 + 10 + i % 5 - 2;        // next to a tenth of one
        const double noise_batch = static_cast<double>(noise) / unit;
        const std::int64_t steps = batch_of_few_steps(noise_batch);
        EXPECT_LE(Wide{10} * noise, Wide{unit} * steps) << noise_batch;
        EXPECT_TRUE(steps == 1 || Wide{10} * noise > Wide{unit} * (steps - 1)) << noise_batch;
        const std::int64_t samples = batch_of_few_samples(noise_batch);
        EXPECT_TRUE(samples == 1 || Wide{10} * unit * samples <= noise) << noise_batch;
        EXPECT_GT(Wide{10} * unit * (samples + 1), noise) << noise_batch;
    }
    // 0.7 as a double is less than 0.7, 0.1 is more than 0.1.
    EXPECT_EQ(batch_of_few_steps(0.7), 7);
    EXPECT_EQ(batch_of_few_steps(0.1), 2);
    for (const double large : {1e18, 1e19, 1e300}) {
        EXPECT_GE(static_cast<double>(batch_of_few_steps(large)), 4e18);
        EXPECT_GE(batch_of_few_samples(large), 100'000'000'000'000'000);
    }
}

TEST(BatchAdvice, WithoutACostOfTheStepTheSmallestBatchIsThereSoonest) {
    const BatchAdvice advice = advise_batch(64.0, even, 0.0, 256, most);
    EXPECT_EQ(advice.table[advice.soonest].batch, 1);
    EXPECT_FALSE(advice.accumulation_pays());
    EXPECT_DOUBLE_EQ(advice.table[0].time, 1);
    EXPECT_DOUBLE_EQ(advice.table[6].time, (2 * 64) / 65.0);
}

TEST(BatchAdvice, AStepThatCostsMuchMakesAccumulationPay) {
    // (1 + 64 / B) (B t + u) is least at B = sqrt(64 u / t) = 16.
    const BatchAdvice advice = advise_batch(64.0, even, 0.04, 1024, most);
    EXPECT_EQ(advice.table[advice.soonest].batch, 16);
    EXPECT_EQ(advice.table[advice.soonest].micro_batch, 4);
    EXPECT_EQ(advice.soonest_uncut.batch, 4);
    EXPECT_TRUE(advice.accumulation_pays());
}

TEST(BatchAdvice, WhereLargerMicroBatchesAreFasterTheWholeBatchMayBeAsGood) {
    const std::vector<TimedCut> cuts = {{1, 0.1}, {2, 0.06}, {4, 0.03}, {8, 0.02}, {16, 0.0101}, {32, 0.01}};
    const BatchAdvice advice = advise_batch(64.0, cuts, 0.001, 1024, most);
    EXPECT_EQ(advice.table[advice.soonest].batch, 16);
    EXPECT_FALSE(advice.table[advice.soonest].is_cut());
    EXPECT_FALSE(advice.accumulation_pays());
    for (const BatchCost& cost : advice.table) EXPECT_LE(cost.micro_batch, cost.batch);
    EXPECT_EQ(advice.table.back().micro_batch, 32);
}

TEST(BatchAdvice, ABatchThatIsHardlySlowerAtOnceDoesNotNeedAccumulation) {
    // 64 in micro-batches of 8: 2 * (64 + 50) ms; at once 2 * (67.2 + 50), 2.8 % more.
    const std::vector<TimedCut> cuts = {{1, 0.002}, {8, 0.001}, {64, 0.00105}};
    const BatchAdvice advice = advise_batch(64.0, cuts, 0.05, 1024, most);
    EXPECT_EQ(advice.table[advice.soonest].batch, 64);
    EXPECT_TRUE(advice.table[advice.soonest].is_cut());
    EXPECT_EQ(advice.soonest_uncut.batch, 64);
    EXPECT_NEAR(advice.soonest_uncut.time, 117.2 / 114, 1e-9);
    EXPECT_FALSE(advice.accumulation_pays());
    EXPECT_TRUE(advise_batch(64.0, std::vector<TimedCut>{{1, 0.002}, {8, 0.001}, {64, 0.0012}}, 0.05, 1024, most)
                    .accumulation_pays());
}

TEST(BatchAdvice, NoBatchOfTheTableIsLargerThanTheData) {
    const BatchAdvice advice = advise_batch(64.0, std::vector<TimedCut>{{4, 0.01}, {16, 0.001}}, 0.001, 256, 9);
    ASSERT_EQ(advice.table.size(), 2u);
    EXPECT_EQ(advice.table.back().batch, 8);
    EXPECT_EQ(advice.soonest_uncut.batch, 4) << "16 samples at once are no batch of this data";
    EXPECT_EQ(advice.samples, 9);
    expect_usage_error({"at most 3"}, [] { advise_batch(64.0, std::vector<TimedCut>{{4, 0.01}}, 0.001, 256, 3); });
}

TEST(BatchAdvice, SaysHowOftenABatchHoldsASample) {
    EXPECT_EQ(describe_repetition(9, 9), "");
    EXPECT_EQ(describe_repetition(64, 9), "a batch of 64 holds each of the data's 9 samples 7.1 times");
    EXPECT_EQ(describe_repetition(18, 9), "a batch of 18 holds each of the data's 9 samples 2 times");
}

TEST(BatchAdvice, ABatchOfMoreThanATenthOfTheDataSaysNothingOfNoise) {
    EXPECT_NO_THROW(require_enough_data(4, 40));
    expect_usage_error({"too small", "batch of 4", "39 samples", "10 %"}, [] { require_enough_data(4, 39); });
    expect_usage_error({"batch of 16 holds each of the data's 9 samples 1.8 times"},
                       [] { require_enough_data(16, 9); });
    EXPECT_NO_THROW(require_enough_data(std::numeric_limits<std::int64_t>::max() / 10, most));
}

TEST(BatchAdvice, RefusesWhatSaysNothing) {
    for (const double noise :
         {0.0, -1.0, std::numeric_limits<double>::infinity(), std::numeric_limits<double>::quiet_NaN()}) {
        expect_usage_error({"noise"}, [&] { advise_batch(noise, even, 0.0, 8, most); });
    }
    expect_usage_error({"at most 0"}, [] { advise_batch(1.0, even, 0.0, 0, most); });
    expect_usage_error({"at most 8"}, [] { advise_batch(1.0, std::vector<TimedCut>{{9, 0.1}}, 0.0, 8, most); });
    expect_usage_error({"micro-batch"}, [] { advise_batch(1.0, {}, 0.0, 8, most); });
}

TEST(BatchAdvice, BeginsWithTheSmallestMicroBatchThatIsKnown) {
    const BatchAdvice advice = advise_batch(10.0, std::vector<TimedCut>{{12, 0.1}, {6, 0.1}}, 0.0, 30, most);
    ASSERT_EQ(advice.table.size(), 3u);
    EXPECT_EQ(advice.table[0].batch, 6);
    EXPECT_EQ(advice.table[2].batch, 24);
    EXPECT_EQ(advice.table[2].micro_batch, 12);
}

TEST(BatchAdvice, TheLargestBatchThereIsEndsTheTable) {
    const BatchAdvice advice = advise_batch(1.0, even, 0.0, most, most);
    EXPECT_EQ(advice.table.size(), 63u);
}

}  // namespace
}  // namespace microbatch
