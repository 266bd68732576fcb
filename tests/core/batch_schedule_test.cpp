#include "microbatch/core/batch_schedule.h"

#include <gtest/gtest.h>

#include "support/errors.h"

namespace microbatch {
namespace {

using test::expect_usage_error;

TEST(BatchSchedule, IsReadAsItIsWritten) {
    const BatchSchedule read = parse_batch_schedule("32 at 0, 128 at 2M tokens,1k at 5M tokens");
    EXPECT_EQ(read, (BatchSchedule{{32, {}}, {128, {2'000'000, Unit::tokens}}, {1000, {5'000'000, Unit::tokens}}}));
    EXPECT_EQ(parse_batch_schedule(to_string(read)), read);
    EXPECT_EQ(parse_batch_schedule("7 at 0 samples"), (BatchSchedule{{7, {0, Unit::samples}}}));
    EXPECT_EQ(parse_batch_schedule("  7  at  0 "), (BatchSchedule{{7, {}}}));
}

TEST(BatchSchedule, AStageBeginsWithTheStepThatBeginsThere) {
    const BatchSchedule schedule = parse_batch_schedule("4 at 0, 8 at 10 samples, 2 at 30 samples");
    const auto at = [&](std::int64_t samples) { return batch_at(schedule, {.steps = 99, .samples = samples}); };
    EXPECT_EQ(at(0), 4);
    EXPECT_EQ(at(9), 4);
    EXPECT_EQ(at(10), 8);
    EXPECT_EQ(at(29), 8);
    EXPECT_EQ(at(30), 2);
    EXPECT_EQ(at(1'000'000), 2);
    EXPECT_EQ(smallest_batch(schedule), 2);
    EXPECT_EQ(largest_batch(schedule), 8);
}

TEST(BatchSchedule, WhatIsNoneIsRefusedAndNamed) {
    for (const char* bad : {"", "32", "32 at", "x at 0", "32 at 0,", "32 at 0, 64", "32 at 0, 64 at 5", "-1 at 0",
                            "32 at 0, 64 at 5 parsecs", "32 at 0, 64 at -5 steps"}) {
        expect_usage_error({}, [&] { parse_batch_schedule(bad); });
    }
    expect_usage_error({"start"}, [] { parse_batch_schedule("32 at 5 steps"); });
    expect_usage_error({"0", "at least 1"}, [] { parse_batch_schedule("0 at 0"); });
    expect_usage_error({"not after"}, [] { parse_batch_schedule("32 at 0, 64 at 0 steps"); });
    expect_usage_error({"not after"}, [] { parse_batch_schedule("32 at 0, 64 at 9 steps, 128 at 8 steps"); });
    expect_usage_error({"steps", "tokens"}, [] { parse_batch_schedule("32 at 0, 64 at 9 steps, 128 at 80 tokens"); });
    expect_usage_error({"no stage"}, [] { validate(BatchSchedule{}); });
}

TEST(Seesaw, DoublesWhereTheRateHasHalved) {
    const Schedule linear{.shape = ScheduleShape::linear, .peak = 1.0, .length = {1000, Unit::samples}};
    const auto samples = [](std::int64_t count) { return Interval{count, Unit::samples}; };
    const BatchSchedule found = seesaw(linear, 8, 64);
    EXPECT_EQ(found, (BatchSchedule{{8, samples(0)}, {16, samples(500)}, {32, samples(750)}, {64, samples(875)}}));
    EXPECT_EQ(seesaw(linear, 8, 63).size(), 3u);
    EXPECT_EQ(seesaw(linear, 8, 8).size(), 1u);
}

TEST(Seesaw, IsWhereTheScheduleSaysWhateverItsShape) {
    for (const ScheduleShape shape :
         {ScheduleShape::linear, ScheduleShape::cosine, ScheduleShape::wsd, ScheduleShape::polynomial}) {
        for (const double floor : {0.0, 0.03, 0.3}) {
            const Schedule schedule{.shape = shape,
                                    .peak = 0.7,
                                    .floor = 0.7 * floor,
                                    .warmup = {1000, Unit::tokens},
                                    .length = {99'991, Unit::tokens},
                                    .decay = {20'000, Unit::tokens}};
            const BatchSchedule stages = seesaw(schedule, 3, 1 << 20);
            validate(stages);
            double rate = 0.7;
            for (std::size_t i = 1; i < stages.size(); ++i) {
                const auto at = [&](std::int64_t tokens) { return learning_rate(schedule, {.tokens = tokens}, {}); };
                rate = 0.7 * 3 / static_cast<double>(stages[i].batch);
                // Halved again and again, or divided once: not the same bits.
                EXPECT_LE(at(stages[i].from.count), rate * (1 + 1e-15));
                EXPECT_GT(at(stages[i].from.count - 1), rate * (1 - 1e-15));
                EXPECT_GT(stages[i].from.count, 1000);
            }
            EXPECT_GE(stages.size(), floor == 0.3 ? 2u : 5u);
        }
    }
}

TEST(Seesaw, RefusesWhereItMeansNothing) {
    const Schedule linear{.shape = ScheduleShape::linear, .peak = 1.0, .length = {1000, Unit::samples}};
    expect_usage_error({"does not fall"}, [] { seesaw({.peak = 1.0}, 8, 64); });
    expect_usage_error({"steps"}, [&] {
        Schedule steps = linear;
        steps.length.unit = Unit::steps;
        seesaw(steps, 8, 64);
    });
    expect_usage_error({"batch", "0"}, [&] { seesaw(linear, 0, 64); });
    expect_usage_error({"4", "8"}, [&] { seesaw(linear, 8, 4); });
}

}  // namespace
}  // namespace microbatch
