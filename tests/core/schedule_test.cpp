#include "microbatch/core/schedule.h"

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
const std::vector<ScheduleShape> all_shapes{ScheduleShape::constant, ScheduleShape::linear, ScheduleShape::cosine,
                                            ScheduleShape::wsd, ScheduleShape::polynomial};

Interval steps(std::int64_t count) {
    return {count, Unit::steps};
}

/// The learning rate of the step after `done` steps of one step each.
double at_step(const Schedule& schedule, std::int64_t done) {
    return learning_rate(schedule, {.steps = done}, {.steps = 1});
}

/// Peak 1, floor 0.25, warmup to step 4, length 12 (8 steps of decay), wsd decay over the last 4.
Schedule example(ScheduleShape shape) {
    return {.shape = shape, .peak = 1, .floor = 0.25, .warmup = steps(4), .length = steps(12), .decay = steps(4)};
}

TEST(Schedule, NamesAreReadAndWritten) {
    for (const ScheduleShape shape : all_shapes) EXPECT_EQ(parse_schedule(to_string(shape)), shape);
    EXPECT_EQ(parse_schedule("wsd"), ScheduleShape::wsd);
    expect_usage_error({"unknown schedule \"exponential\"; choose one of constant, linear, cosine, wsd, polynomial"},
                       [] { parse_schedule("exponential"); });
    expect_usage_error({"unknown schedule \"\""}, [] { parse_schedule(""); });
}

TEST(Schedule, WarmupClimbsFromOnePartToThePeak) {
    for (const ScheduleShape shape : all_shapes) {
        const Schedule schedule = example(shape);
        EXPECT_EQ(at_step(schedule, 0), 0.25);
        EXPECT_EQ(at_step(schedule, 1), 0.5);
        EXPECT_EQ(at_step(schedule, 2), 0.75);
        EXPECT_EQ(at_step(schedule, 3), 1);
    }
}

TEST(Schedule, EveryShapeLeavesWarmupAtThePeakAndEndsAtTheFloor) {
    for (const ScheduleShape shape : all_shapes) {
        Schedule schedule = example(shape);
        schedule.peak = 3e-4;
        schedule.floor = 7e-6;  // numbers for which peak + (floor - peak) is not floor
        EXPECT_EQ(at_step(schedule, 3), 3e-4);
        if (shape != ScheduleShape::wsd) {
            EXPECT_EQ(at_step(schedule, 4), 3e-4);
        }
        const double end = shape == ScheduleShape::constant ? 3e-4 : 7e-6;
        for (const std::int64_t done : {std::int64_t{12}, std::int64_t{13}, largest - 1}) {
            EXPECT_EQ(at_step(schedule, done), end) << to_string(shape);
        }
    }
}

// Golden values by hand from the formulas in schedule.h. With x = 1/4, 1/2 and 3/4 at steps 6, 8 and 10.
TEST(Schedule, LinearFallsInAStraightLine) {
    const Schedule schedule = example(ScheduleShape::linear);
    EXPECT_EQ(at_step(schedule, 6), 0.8125);
    EXPECT_EQ(at_step(schedule, 8), 0.625);
    EXPECT_EQ(at_step(schedule, 10), 0.4375);
}

TEST(Schedule, CosineFallsAlongHalfAWave) {
    const Schedule schedule = example(ScheduleShape::cosine);
    // 0.25 + 0.75 (1 +- sqrt(1/2)) / 2; cos() is good to a unit in the last place, not exact.
    EXPECT_NEAR(at_step(schedule, 6), 0.625 + 0.375 * std::sqrt(0.5), 1e-15);
    EXPECT_NEAR(at_step(schedule, 8), 0.625, 1e-15);
    EXPECT_NEAR(at_step(schedule, 10), 0.625 - 0.375 * std::sqrt(0.5), 1e-15);
}

TEST(Schedule, PolynomialFallsByItsPower) {
    Schedule schedule = example(ScheduleShape::polynomial);
    EXPECT_EQ(at_step(schedule, 8), 0.25 + 0.75 / 4);
    EXPECT_EQ(at_step(schedule, 10), 0.25 + 0.75 / 16);
    schedule.power = 3;
    EXPECT_EQ(at_step(schedule, 8), 0.25 + 0.75 / 8);
    schedule.power = 0.5;
    EXPECT_EQ(at_step(schedule, 10), 0.25 + 0.75 / 2);
}

TEST(Schedule, WsdStaysAtThePeakAndThenFallsInAStraightLine) {
    const Schedule schedule = example(ScheduleShape::wsd);
    for (const std::int64_t done : {4, 6, 7}) EXPECT_EQ(at_step(schedule, done), 1);
    // A fifth of the way each.
    EXPECT_DOUBLE_EQ(at_step(schedule, 8), 0.85);
    EXPECT_DOUBLE_EQ(at_step(schedule, 9), 0.7);
    EXPECT_DOUBLE_EQ(at_step(schedule, 10), 0.55);
    EXPECT_DOUBLE_EQ(at_step(schedule, 11), 0.4);
    EXPECT_EQ(at_step(schedule, 12), 0.25);
}

TEST(Schedule, WsdDecaysHoweverShortItsDecay) {
    Schedule schedule = example(ScheduleShape::wsd);
    schedule.decay = steps(1);
    EXPECT_EQ(at_step(schedule, 10), 1);
    EXPECT_EQ(at_step(schedule, 11), 0.625);
    // Shorter than a batch, at the end of a batch or reaching into the next one.
    for (const std::int64_t decay : {1, 10, 63, 64, 65, 70}) {
        const Schedule in_samples{
            .shape = ScheduleShape::wsd, .peak = 1, .length = {640, Unit::samples}, .decay = {decay, Unit::samples}};
        const auto rate = [&](std::int64_t before) {
            return learning_rate(in_samples, {.samples = before}, {.steps = 1, .samples = 64});
        };
        EXPECT_LT(rate(576), 1) << decay;
        EXPECT_GT(rate(576), 0) << decay;
        EXPECT_EQ(rate(512) < 1, decay > 64) << decay;
        EXPECT_EQ(rate(448), 1) << decay;
    }
}

TEST(Schedule, ConstantNeedsNoLengthAndStaysAtThePeak) {
    const Schedule schedule{.peak = 0.5, .warmup = {2, Unit::samples}, .length = {0, Unit::steps}};
    EXPECT_EQ(learning_rate(schedule, {.samples = 0}, {.samples = 1}), 0.25);
    EXPECT_EQ(learning_rate(schedule, {.samples = 2}, {.samples = 1}), 0.5);
    EXPECT_EQ(learning_rate(schedule, {.samples = largest - 1}, {.samples = 1}), 0.5);
}

TEST(Schedule, NeverRisesAfterWarmupAndStaysBetweenFloorAndPeak) {
    std::mt19937_64 random(1);
    std::uniform_real_distribution<double> unit(0, 1);
    for (const ScheduleShape shape : all_shapes) {
        for (int trial = 0; trial < 50; ++trial) {
            const auto warmup = static_cast<std::int64_t>(random() % 50);
            const auto decay = static_cast<std::int64_t>(1 + random() % 50);
            const double peak = unit(random);
            const Schedule schedule{.shape = shape,
                                    .peak = peak,
                                    .floor = peak * unit(random),
                                    .warmup = steps(warmup),
                                    .length = steps(warmup + decay + static_cast<std::int64_t>(random() % 100)),
                                    .decay = steps(decay),
                                    .power = 0.1 + 4 * unit(random)};
            double previous = 0;
            for (std::int64_t done = 0; done <= schedule.length.count + 1; ++done) {
                const double rate = at_step(schedule, done);
                if (done < warmup) {
                    EXPECT_GT(rate, previous);
                } else if (done > warmup) {
                    EXPECT_LE(rate, previous);
                    EXPECT_GE(rate, schedule.floor);
                }
                EXPECT_LE(rate, peak);
                previous = rate;
            }
        }
    }
}

TEST(Schedule, CountsInSamplesAndTokens) {
    // 8 steps of 10 samples or 1,000 tokens each: the same rates in every unit.
    const Schedule in_steps{
        .shape = ScheduleShape::linear, .peak = 1, .warmup = {2, Unit::steps}, .length = {8, Unit::steps}};
    Schedule in_samples = in_steps;
    in_samples.warmup = {20, Unit::samples};
    in_samples.length = {80, Unit::samples};
    Schedule in_tokens = in_steps;
    in_tokens.warmup = {2'000, Unit::tokens};
    in_tokens.length = {8'000, Unit::tokens};
    const Progress batch{.steps = 1, .samples = 10, .tokens = 1'000};
    Progress before;
    for (int step = 0; step < 10; ++step, before += batch) {
        const double expected = learning_rate(in_steps, before, batch);
        EXPECT_EQ(learning_rate(in_samples, before, batch), expected) << step;
        EXPECT_EQ(learning_rate(in_tokens, before, batch), expected) << step;
    }
}

TEST(Schedule, ABatchThatPassesTheEndOfWarmupRunsAtThePeak) {
    const Schedule schedule{.peak = 1, .warmup = {100, Unit::samples}};
    EXPECT_EQ(learning_rate(schedule, {.samples = 0}, {.samples = 64}), 0.64);
    EXPECT_EQ(learning_rate(schedule, {.samples = 64}, {.samples = 64}), 1);
}

TEST(Schedule, AskingOnceAMicroBatchOrInAnyOrderChangesNothing) {
    const Progress batch{.steps = 1, .samples = 64, .tokens = 64};
    for (const ScheduleShape shape : all_shapes) {
        const Schedule schedule = example(shape);
        std::vector<double> forward;
        for (std::int64_t done = 0; done < 14; ++done)
            forward.push_back(learning_rate(schedule, {.steps = done}, batch));
        for (std::int64_t done = 13; done >= 0; --done) {
            for (int micro_batch = 0; micro_batch < 7; ++micro_batch) {
                EXPECT_EQ(learning_rate(schedule, {.steps = done}, batch), forward[static_cast<std::size_t>(done)]);
            }
        }
    }
}

TEST(Schedule, AWarmupAsLongAsTheScheduleIsNotANumberThatIsMissing) {
    for (const ScheduleShape shape : {ScheduleShape::linear, ScheduleShape::cosine, ScheduleShape::polynomial}) {
        const Schedule schedule{.shape = shape, .peak = 1, .floor = 0.25, .warmup = steps(4), .length = steps(4)};
        EXPECT_EQ(at_step(schedule, 3), 1);
        EXPECT_EQ(at_step(schedule, 4), 0.25);
    }
    const Schedule wsd{.shape = ScheduleShape::wsd,
                       .peak = 1,
                       .floor = 0.25,
                       .warmup = steps(2),
                       .length = steps(4),
                       .decay = steps(2)};
    EXPECT_EQ(at_step(wsd, 1), 1);
    EXPECT_EQ(at_step(wsd, 2), 0.75);
    EXPECT_EQ(at_step(wsd, 3), 0.5);
    EXPECT_EQ(at_step(wsd, 4), 0.25);
}

TEST(Schedule, HugeValuesGiveFiniteRates) {
    for (const ScheduleShape shape : all_shapes) {
        const Schedule schedule{.shape = shape,
                                .peak = std::numeric_limits<double>::max(),
                                .warmup = steps(largest / 2),
                                .length = steps(largest),
                                .decay = steps(largest / 2),
                                .power = 1e300};
        for (const std::int64_t done : {std::int64_t{0}, largest / 2, largest / 4 * 3, largest - 1}) {
            const double rate = at_step(schedule, done);
            EXPECT_TRUE(std::isfinite(rate) && rate >= 0) << to_string(shape) << " at " << done << ": " << rate;
        }
    }
}

TEST(Schedule, RefusesRatesThatMeanNothing) {
    const double nan = std::nan("");
    const double infinity = std::numeric_limits<double>::infinity();
    for (const double peak : {-1e-3, nan, infinity}) {
        expect_usage_error({"the peak learning rate is "}, [&] { validate({.peak = peak}); });
    }
    for (const double floor : {-1e-3, nan, infinity, 2e-3}) {
        expect_usage_error({"it must be from 0 to the peak, 0.001"}, [&] { validate({.peak = 1e-3, .floor = floor}); });
    }
    for (const double power : {0.0, -1.0, nan, infinity}) {
        Schedule schedule = example(ScheduleShape::polynomial);
        schedule.power = power;
        expect_usage_error({"the power of the polynomial schedule is "}, [&] { validate(schedule); });
        schedule.shape = ScheduleShape::linear;
        EXPECT_NO_THROW(validate(schedule));
    }
    EXPECT_NO_THROW(validate({.peak = 0}));
}

TEST(Schedule, RefusesIntervalsThatDoNotMakeASchedule) {
    for (const ScheduleShape shape : all_shapes) {
        EXPECT_NO_THROW(validate(example(shape)));
        Schedule schedule = example(shape);
        schedule.warmup = steps(13);
        expect_usage_error({"warmup (13 steps)", "12 steps"}, [&] { validate(schedule); });
        if (shape == ScheduleShape::constant) continue;
        schedule = example(shape);
        schedule.length = steps(0);
        expect_usage_error({std::string(to_string(shape)) + " schedule has no length"}, [&] { validate(schedule); });
    }
    Schedule schedule = example(ScheduleShape::wsd);
    schedule.warmup = steps(8);
    EXPECT_NO_THROW(validate(schedule));
    schedule.warmup = steps(9);
    expect_usage_error(
        {"the wsd schedule has no room for warmup (9 steps) and decay (4 steps): its length is 12 steps"},
        [&] { validate(schedule); });
    schedule.decay = steps(largest);
    expect_usage_error({"no room"}, [&] { validate(schedule); });
    schedule.decay = steps(0);
    expect_usage_error({"the wsd schedule has no decay"}, [&] { validate(schedule); });
    expect_usage_error({"the warmup of the schedule is -1 steps"}, [] { validate({.warmup = steps(-1)}); });
    expect_usage_error({"the length of the schedule is -1 steps"}, [] { validate({.length = steps(-1)}); });
    expect_usage_error({"the decay of the schedule is -1 steps"}, [] { validate({.decay = steps(-1)}); });
}

TEST(Schedule, RefusesIntervalsInDifferentUnitsWhereItMatters) {
    Schedule schedule = example(ScheduleShape::cosine);
    schedule.warmup = {4, Unit::samples};
    expect_usage_error(
        {"the warmup is 4 samples but the length of the schedule is 12 steps; state both in the same unit"},
        [&] { validate(schedule); });
    schedule.warmup = {0, Unit::samples};
    schedule.decay = {4, Unit::tokens};
    EXPECT_NO_THROW(validate(schedule));
    schedule.shape = ScheduleShape::wsd;
    expect_usage_error({"the decay is 4 tokens but the length of the schedule is 12 steps"},
                       [&] { validate(schedule); });
    schedule.shape = ScheduleShape::constant;
    schedule.warmup = {4, Unit::samples};
    EXPECT_NO_THROW(validate(schedule));
}

TEST(Schedule, RefusesAnInvalidScheduleOrNegativeProgressWhenAsked) {
    expect_usage_error({"the peak learning rate is -1"}, [] { at_step({.peak = -1}, 0); });
    expect_usage_error({"negative progress: before -1 steps"}, [] { at_step({}, -1); });
    expect_usage_error({"-5 tokens; count from 0"}, [] { learning_rate({}, {}, {.tokens = -5}); });
    expect_usage_error({"progress exceeds 64 bits"}, [] { at_step({}, largest); });
}

}  // namespace
}  // namespace microbatch
