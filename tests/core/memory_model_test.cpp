#include "microbatch/core/memory_model.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <random>
#include <vector>

#include "support/errors.h"

namespace microbatch {
namespace {

using test::expect_usage_error;

constexpr std::int64_t largest = std::numeric_limits<std::int64_t>::max();

struct Work {
    std::vector<std::int64_t> fixed, each;

    MemoryPoint at(std::int64_t size) const {
        MemoryPoint point{.micro_batch = size};
        for (std::size_t i = 0; i < fixed.size(); ++i) point.profile.push_back(fixed[i] + each[i] * size);
        return point;
    }
};

TEST(MemoryModel, ThePeakOfAProfileIsItsLargest) {
    EXPECT_EQ(peak_of({}), 0);
    EXPECT_EQ(peak_of({3, 9, 4}), 9);
}

TEST(MemoryModel, PredictsThePeakOfAffineAllocationsExactlyWhateverItsKinks) {
    std::mt19937_64 random(1);
    std::size_t kinked = 0;
    for (int i = 0; i < 1000; ++i) {
        Work work;
        for (std::size_t n = 2 + random() % 40; n > 0; --n) {
            work.fixed.push_back(static_cast<std::int64_t>(random() % 4'000'000'000));
            work.each.push_back(static_cast<std::int64_t>(random() % 3 * (random() % 50'000'000)));
        }
        const auto small = static_cast<std::int64_t>(1 + random() % 8);
        // A power of two apart: the slope is exact in fp64, and so is every prediction.
        const MemoryModel model = fit_memory(work.at(small), work.at(small + (1 << random() % 5)));
        EXPECT_TRUE(model.matched);
        kinked += model.lines.size() > 1 ? 1U : 0U;
        for (const std::int64_t size : {1, 2, 3, 7, 50, 333, 4096}) {
            EXPECT_EQ(model.predict(size), peak_of(work.at(size).profile));
        }
    }
    EXPECT_GT(kinked, 500U);
}

TEST(MemoryModel, KeepsOnlyTheLinesThatAreTheLargestSomewhere) {
    // 100, 60 + 10 b, 10 + 20 b: each is the largest somewhere; 50 + 10 b and 30 + 15 b nowhere.
    const Work work{.fixed = {100, 60, 10, 50, 30}, .each = {0, 10, 20, 10, 15}};
    const MemoryModel model = fit_memory(work.at(1), work.at(2));
    const std::vector<MemoryLine> expected = {{100, 0}, {60, 10}, {10, 20}};
    EXPECT_EQ(model.lines, expected);
    EXPECT_EQ(model.line_at(1), expected[0]);
    EXPECT_EQ(model.line_at(4).at(4), 100);
    EXPECT_EQ(model.line_at(6), expected[2]);
}

TEST(MemoryModel, ComparesPeaksWhereTheAllocationsDoNotMatch) {
    const MemoryModel model = fit_memory({2, {5, 120, 7}}, {4, {140, 2}});
    EXPECT_FALSE(model.matched);
    EXPECT_EQ(model.predict(10), 200);
}

TEST(MemoryModel, NoPredictionFallsAsTheMicroBatchGrows) {
    std::mt19937_64 random(2);
    for (int i = 0; i < 300; ++i) {
        MemoryPoint small{.micro_batch = 3}, large{.micro_batch = 5};
        for (int n = 0; n < 10; ++n) {
            small.profile.push_back(static_cast<std::int64_t>(random() % 1000));
            large.profile.push_back(static_cast<std::int64_t>(random() % 1000));
        }
        const MemoryModel model = fit_memory(small, large);
        for (std::int64_t size = 1; size < 20; ++size) EXPECT_LE(model.predict(size), model.predict(size + 1));
        EXPECT_GE(model.predict(3), peak_of(small.profile));
        EXPECT_GE(model.predict(5), peak_of(large.profile));
    }
}

TEST(MemoryModel, RoundsPredictionsUpAndKeepsThemInRange) {
    const auto predict = [](MemoryLine line, std::int64_t size) { return MemoryModel{.lines = {line}}.predict(size); };
    EXPECT_EQ(predict({10.25, 0.5}, 1), 11);
    EXPECT_EQ(predict({10.5, 0.5}, 1), 11);
    EXPECT_EQ(predict({-100, 20}, 2), 0);
    EXPECT_EQ(predict({0, 1e6}, largest), largest);
    EXPECT_EQ(predict({0x1p63, 0}, 1), largest);
    EXPECT_EQ(predict({1e300, 1e300}, largest), largest);
}

TEST(MemoryModel, RefusesPointsThatDoNotMakeALine) {
    expect_usage_error({"0 and 4", "at least 1"}, [] { fit_memory({0, {1}}, {4, {2}}); });
    expect_usage_error({"4 and 4"}, [] { fit_memory({4, {1}}, {4, {2}}); });
    expect_usage_error({"4 and 2", "smaller one first"}, [] { fit_memory({4, {1}}, {2, {2}}); });
    expect_usage_error({"profile is empty"}, [] { fit_memory({1, {}}, {2, {2}}); });
    expect_usage_error({"profile is empty"}, [] { fit_memory({1, {2}}, {2, {}}); });
}

TEST(MemoryModel, RefusesToPredictWithAModelOrSizeThatMeansNothing) {
    expect_usage_error({"empty memory model"}, [] { static_cast<void>(MemoryModel{}.predict(1)); });
    const MemoryModel model{.lines = {{1, 1}}};
    expect_usage_error({"micro-batch is 0"}, [&] { static_cast<void>(model.predict(0)); });
    expect_usage_error({"micro-batch is 0"}, [&] { static_cast<void>(model.line_at(0)); });
}

}  // namespace
}  // namespace microbatch
