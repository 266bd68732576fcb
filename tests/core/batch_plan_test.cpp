#include "microbatch/core/batch_plan.h"

#include <gtest/gtest.h>

#include <random>
#include <string>

#include "support/errors.h"

namespace microbatch {
namespace {

using test::expect_usage_error;

TEST(BatchPlan, HundredInSixteenIsSixOfSixteenAndOneOfFour) {
    ASSERT_EQ(micro_batch_count(100, 16), 7);
    for (std::int64_t index = 0; index < 6; ++index) EXPECT_EQ(micro_batch_slice(100, 16, index).size(), 16);
    EXPECT_EQ(micro_batch_slice(100, 16, 6), (Slice{96, 100}));
}

TEST(BatchPlan, SlicesTileTheBatchInOrderFullToTheLastAndLeaveNoSampleByItself) {
    std::mt19937_64 random(1);
    for (int trial = 0; trial < 2'000; ++trial) {
        const auto batch = static_cast<std::int64_t>(random() % 300);
        const auto micro_batch = static_cast<std::int64_t>(1 + random() % 320);
        const std::int64_t count = micro_batch_count(batch, micro_batch);
        std::int64_t reached = 0;
        const bool left_over = batch % micro_batch == 1 && micro_batch > 2 && count > 1;
        for (std::int64_t index = 0; index < count; ++index) {
            const Slice slice = micro_batch_slice(batch, micro_batch, index);
            EXPECT_EQ(slice.begin, reached);
            EXPECT_GT(slice.size(), 0);
            EXPECT_LE(slice.size(), micro_batch);
            EXPECT_EQ(slice.size(), next_cut(batch - reached, micro_batch));
            if (index + 2 < count) {
                EXPECT_EQ(slice.size(), micro_batch);
            }
            if (index + 2 == count) {
                EXPECT_EQ(slice.size(), left_over ? micro_batch - 1 : micro_batch);
            }
            EXPECT_TRUE(slice.size() > 1 || micro_batch <= 2 || batch == 1) << batch << " in " << micro_batch;
            reached = slice.end;
        }
        EXPECT_EQ(reached, batch);
    }
}

TEST(BatchPlan, ASampleThatWouldBeLeftOverTakesOneFromTheMicroBatchBefore) {
    EXPECT_EQ(micro_batch_slice(33, 32, 0), (Slice{0, 31}));
    EXPECT_EQ(micro_batch_slice(33, 32, 1), (Slice{31, 33}));
    EXPECT_EQ(micro_batch_slice(33, 16, 2), (Slice{31, 33}));
    EXPECT_EQ(micro_batch_slice(3, 2, 0), (Slice{0, 2})) << "one is by itself either way";
    EXPECT_EQ(micro_batch_slice(3, 1, 1), (Slice{1, 2}));
    EXPECT_EQ(micro_batch_slice(1, 8, 0), (Slice{0, 1}));
}

TEST(BatchPlan, AnEmptyBatchHasNoMicroBatches) {
    EXPECT_EQ(micro_batch_count(0, 16), 0);
    EXPECT_EQ(micro_batch_count(0, whole_batch), 0);
    expect_usage_error({"micro-batch 0 of a batch that has 0"}, [] { micro_batch_slice(0, 16, 0); });
}

TEST(BatchPlan, ThePlanDoesNotCutUnlessTold) {
    const Plan plan;
    EXPECT_EQ(micro_batch_count(100, plan.micro_batch), 1);
    EXPECT_EQ(micro_batch_slice(100, plan.micro_batch, 0), (Slice{0, 100}));
}

TEST(BatchPlan, HugeSizesDoNotOverflow) {
    EXPECT_EQ(micro_batch_count(whole_batch, 1), whole_batch);
    EXPECT_EQ(micro_batch_slice(whole_batch, 1, whole_batch - 1), (Slice{whole_batch - 1, whole_batch}));
    EXPECT_EQ(micro_batch_count(whole_batch, whole_batch), 1);
    EXPECT_EQ(micro_batch_count(whole_batch, whole_batch - 1), 2);
    EXPECT_EQ(micro_batch_slice(whole_batch, whole_batch - 1, 0), (Slice{0, whole_batch - 2}));
    EXPECT_EQ(micro_batch_slice(whole_batch, whole_batch - 1, 1), (Slice{whole_batch - 2, whole_batch}));
    EXPECT_EQ(micro_batch_slice(whole_batch, whole_batch - 2, 1), (Slice{whole_batch - 2, whole_batch}));
}

TEST(BatchPlan, RefusesSizesAndIndicesOutOfRange) {
    expect_usage_error({"the batch is -1 samples"}, [] { micro_batch_count(-1, 16); });
    expect_usage_error({"the micro-batch is 0 samples; it must be 1 or more"}, [] { micro_batch_count(100, 0); });
    expect_usage_error({"the micro-batch is -16 samples"}, [] { micro_batch_count(100, -16); });
    expect_usage_error({"the micro-batch is 0 samples"}, [] { micro_batch_slice(100, 0, 0); });
    expect_usage_error({"micro-batch 7 of a batch that has 7 (100 samples in 16)"},
                       [] { micro_batch_slice(100, 16, 7); });
    expect_usage_error({"micro-batch -1 of a batch that has 7"}, [] { micro_batch_slice(100, 16, -1); });
}

}  // namespace
}  // namespace microbatch
