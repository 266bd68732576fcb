#include "microbatch/core/trials.h"

#include <gtest/gtest.h>

#include <random>

namespace microbatch {
namespace {

MicroBatchTrial trial(std::int64_t first, std::int64_t later, double seconds) {
    MicroBatchTrial result{.first = {first}, .seconds = seconds};
    if (later > 0) result.later = {later};
    return result;
}

TEST(Trials, SaysNothingOfMemoryBeforeTwoSizesWereTried) {
    Trials trials(8);
    EXPECT_TRUE(trials.empty());
    EXPECT_FALSE(trials.peaks(1));
    EXPECT_EQ(trials.seconds(1), 0.0);
    EXPECT_TRUE(trials.matched());
    trials.add(1, trial(110, 210, 1.0));
    EXPECT_EQ(trials.peaks(1)->first, 110);
    EXPECT_EQ(trials.peaks(1)->later, 210);
    EXPECT_FALSE(trials.peaks(2));
}

TEST(Trials, PredictsTheWholeBatchWithoutLaterMicroBatches) {
    Trials trials(8);
    trials.add(1, trial(110, 210, 1.0));
    trials.add(2, trial(120, 220, 2.0));
    EXPECT_EQ(trials.peaks(4)->first, 140);
    EXPECT_EQ(trials.peaks(4)->later, 240);
    EXPECT_EQ(trials.peaks(8)->first, 180);
    EXPECT_EQ(trials.peaks(8)->later, 0);
}

TEST(Trials, NeedsTwoCutTrialsToPredictACutSize) {
    Trials trials(8);
    trials.add(1, trial(110, 210, 1.0));
    trials.add(8, trial(180, 0, 2.0));
    EXPECT_FALSE(trials.peaks(4));
    EXPECT_EQ(trials.peaks(8)->first, 180);
}

TEST(Trials, PredictsFromTheLastTwoSizes) {
    Trials trials(100);
    trials.add(4, trial(150, 250, 1.0));
    trials.add(1, trial(110, 210, 1.0));  // in any order
    trials.add(2, trial(120, 220, 1.0));
    EXPECT_EQ(trials.peaks(6)->first, 180);
    EXPECT_EQ(trials.largest(), 4);
}

TEST(Trials, TellsWhetherTheLastTwoAllocatedAlike) {
    Trials trials(100);
    trials.add(1, {.first = {1, 2}, .later = {1, 2}});
    trials.add(2, {.first = {1, 2, 3}, .later = {1, 2}});
    EXPECT_FALSE(trials.matched());
    trials.add(4, {.first = {1, 2, 4}, .later = {1, 2}});
    EXPECT_TRUE(trials.matched());
}

TEST(Trials, ASizeThatFailedFailsEveryLargerOneButTheWholeBatch) {
    Trials trials(8);
    EXPECT_FALSE(trials.any_cut_failed());
    trials.add_failure(8);
    EXPECT_TRUE(trials.failed(8));
    EXPECT_FALSE(trials.failed(7));
    EXPECT_FALSE(trials.any_cut_failed());
    Trials cut(8);
    cut.add_failure(4);
    cut.add_failure(6);
    EXPECT_FALSE(cut.failed(3));
    EXPECT_TRUE(cut.failed(4));
    EXPECT_TRUE(cut.failed(7));
    EXPECT_FALSE(cut.failed(8));
    EXPECT_TRUE(cut.any_cut_failed());
}

TEST(Trials, FindsAnAffineTimeAtEverySize) {
    std::mt19937_64 random(1);
    for (int i = 0; i < 200; ++i) {
        const auto fixed = static_cast<double>(random() % 1000), each = static_cast<double>(random() % 1000);
        Trials trials(1000);
        for (const std::int64_t size : {1, 2, 8, 64}) {
            trials.add(size, trial(1, 1, fixed + each * static_cast<double>(size)));
        }
        for (const std::int64_t size : {1, 2, 3, 5, 8, 33, 64, 65, 1000}) {
            const double expected = fixed + each * static_cast<double>(size);
            // A division, a product and a sum, each rounded once.
            EXPECT_NEAR(trials.seconds(size), expected, 1e-12 * expected);
            EXPECT_NEAR(trials.least_seconds(size), expected, 1e-12 * expected);
        }
    }
}

TEST(Trials, TheTimeOfASingleTrialIsSharedOut) {
    Trials trials(100);
    trials.add(12, trial(1, 1, 6.0));
    EXPECT_DOUBLE_EQ(trials.seconds(4), 2.0);
    EXPECT_DOUBLE_EQ(trials.seconds(24), 12.0);
    EXPECT_DOUBLE_EQ(trials.least_seconds(24), 12.0);
}

TEST(Trials, TheLeastTimeIsThatOfTheLineBeforeTheRise) {
    Trials trials(100);
    trials.add(1, trial(1, 1, 2.0));
    trials.add(2, trial(1, 1, 3.0));
    trials.add(10, trial(1, 1, 20.0));  // the line through 1 and 2 says 11
    EXPECT_DOUBLE_EQ(trials.least_seconds(6), 7.0);
    EXPECT_DOUBLE_EQ(trials.seconds(6), 11.5);
    EXPECT_DOUBLE_EQ(trials.least_seconds(10), 20.0);
    EXPECT_DOUBLE_EQ(trials.seconds(12), 20.0 + 2 * 17.0 / 8);
}

TEST(Trials, NoLargerMicroBatchIsExpectedToTakeLessTime) {
    Trials trials(100);
    trials.add(1, trial(1, 1, 3.0));
    trials.add(2, trial(1, 1, 2.0));
    EXPECT_EQ(trials.seconds(50), 2.0);
}

}  // namespace
}  // namespace microbatch
