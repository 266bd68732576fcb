// The planner on jobs whose memory and time are known at every size, so that its choice can be compared with all
// others.
#include "microbatch/core/planner.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "microbatch/core/str_cat.h"
#include "support/fake_job.h"

namespace microbatch {
namespace {

using namespace test;

constexpr double nan_value = std::numeric_limits<double>::quiet_NaN();

struct Drawn {
    FakeJob job;
    PlannerOptions options;
};

Drawn draw_job(std::mt19937_64& random) {
    const auto draw = [&](double low, double high) {
        return std::uniform_real_distribution<double>(low, high)(random);
    };
    const auto whole = [&](double low, double high) { return static_cast<std::int64_t>(std::exp(draw(low, high))); };
    Drawn result;
    FakeJob& job = result.job;
    job.parameters = whole(5, 12);
    job.gradients = job.parameters;
    job.state = job.parameters * static_cast<std::int64_t>(random() % 3);
    job.lines.clear();
    for (std::size_t i = 0; i < 1 + random() % 4; ++i) {
        job.lines.push_back({.fixed_bytes = static_cast<double>(whole(0, 10)),
                             .bytes_per_sample = 4.0 * static_cast<double>(whole(0, 7))});
    }
    job.time = curve(1e-2 * std::exp(draw(-5, 3)), std::exp(draw(0, 6)), draw(0, 0.15));
    job.update_seconds = std::exp(draw(-8, -3));
    result.options.batch = whole(0, 6.5);
    job.batch = result.options.batch;
    result.options.offers_recompute = random() % 2 == 0;
    const Plan some{.micro_batch = 1 + static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(job.batch)),
                    .recompute = result.options.offers_recompute && random() % 2 == 0};
    result.options.budget_bytes = job.true_peak(some) + whole(0, 8) - 1;
    return result;
}

TEST(PlannerSearch, IsWithinFivePercentOfTheBestOfAllPlans) {
    std::mt19937_64 random(1);
    int cut = 0, whole = 0, recomputed = 0, off = 0;
    for (int i = 0; i < 1500; ++i) {
        auto [job, options] = draw_job(random);
        const PlanReport report = plan(job, options);
        expect_sound(job, options, report);
        const double best = best_of_all(job, options);
        ASSERT_TRUE(report.chosen) << i;
        const Plan chosen = report.choice().plan;
        EXPECT_LE(job.true_peak(chosen), options.budget_bytes) << i;
        if (job.step_seconds(chosen) > 1.05 * best) {
            ++off;
            std::string tried;
            for (const Plan& one : job.asked) tried += str_cat(" ", one.micro_batch, one.recompute ? "r" : "");
            ADD_FAILURE() << i << ": batch " << options.batch << ", micro-batch " << chosen.micro_batch
                          << (chosen.recompute ? " recomputed, " : ", ") << job.step_seconds(chosen) / best << ", tried"
                          << tried;
        }
        (report.choice().micro_batches == 1 ? whole : cut) += 1;
        recomputed += chosen.recompute ? 1 : 0;
    }
    EXPECT_EQ(off, 0);
    EXPECT_GT(std::min({cut, whole, recomputed}), 50) << "the jobs are all alike";
}

TEST(PlannerSearch, IsAsGoodWhereNoSingleSampleCanBeTrainedOn) {
    std::mt19937_64 random(9);
    int cut = 0, odd = 0;
    for (int i = 0; i < 1500; ++i) {
        auto [job, options] = draw_job(random);
        if (job.batch == 1) continue;
        job.fewest = 2;
        const double best = best_of_all(job, options);
        const PlanReport report = plan(job, options);
        expect_sound(job, options, report);
        EXPECT_EQ(report.chosen.has_value(), std::isfinite(best)) << i;
        if (!report.chosen) continue;
        // The first trials are of 2 and 3 samples, and leave less of a small batch's time for the others.
        EXPECT_LE(job.step_seconds(report.choice().plan), 1.08 * best) << i << ": batch " << options.batch;
        cut += report.choice().micro_batches > 1 ? 1 : 0;
        odd += options.batch % 2;
    }
    EXPECT_GT(std::min(cut, odd), 100) << "the jobs are all alike";
}

TEST(PlannerSearch, TakesAtMostThreeStepsTimeBesidesTheTrialsThatAreAlwaysMade) {
    std::mt19937_64 random(2);
    for (int i = 0; i < 1500; ++i) {
        auto [job, options] = draw_job(random);
        options.least_seconds = 0.0;
        const PlanReport report = plan(job, options);
        ASSERT_TRUE(report.chosen);
        if (options.batch < 16) continue;  // of which any trial is most of a step
        // What a trial costs is known only afterwards; where a cache is full it is more than was expected.
        EXPECT_LE(job.optional_seconds, 3.0 * job.step_seconds(report.choice().plan) * 1.2)
            << i << ": batch " << options.batch << ", " << job.asked.size();
    }
}

TEST(PlannerSearch, NamesTheLeastMemoryThatAnyPlanNeedsWhereNothingFits) {
    std::mt19937_64 random(8);
    int uncut = 0, cut = 0, recomputed = 0;
    for (int i = 0; i < 1500; ++i) {
        auto [job, options] = draw_job(random);
        if (i % 2 == 0) job.lines.push_back({.fixed_bytes = 0, .bytes_per_sample = 4});
        if (i % 4 == 0 && job.batch > 1) job.fewest = 2;
        std::int64_t least = largest_int64;
        for (const bool recompute : {false, options.offers_recompute}) {
            for (std::int64_t size = 1; size <= job.batch; ++size) {
                if (!is_possible(job, size)) continue;
                least = std::min(least, job.true_peak({.micro_batch = size, .recompute = recompute}));
            }
        }
        options.most_bytes = largest_int64;
        // Anything from where not even the parameters fit to one byte short.
        options.budget_bytes = 1 + static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(least - 1));
        if (i % 3 == 0) options.budget_bytes = least - 1;
        FakeJob again = job;
        const PlanReport report = plan(job, options);
        ASSERT_FALSE(report.chosen) << i;
        ASSERT_NE(smallest(report), nullptr) << i;
        EXPECT_EQ(smallest(report)->peak_bytes(), least) << i << ": batch " << options.batch;
        (smallest(report)->micro_batches == 1 ? uncut : cut) += 1;
        recomputed += smallest(report)->plan.recompute ? 1 : 0;
        options.budget_bytes = least;
        EXPECT_TRUE(plan(again, options).chosen) << i << ": the memory that was named is not enough";
    }
    EXPECT_GT(std::min({uncut, cut, recomputed}), 50) << "the jobs are all alike";
}

TEST(PlannerSearch, PredictsMatchedAllocationsExactlyAndAsksForNoneThatDoesNotFit) {
    std::mt19937_64 random(3);
    int predicted = 0;
    for (int i = 0; i < 1000; ++i) {
        auto [job, options] = draw_job(random);
        const PlanReport report = plan(job, options);
        EXPECT_TRUE(report.affine);
        EXPECT_EQ(report.worst_relative_error, 0.0) << i;
        for (const Candidate& one : report.candidates) {
            if (!one.predicted) continue;
            EXPECT_EQ(one.predicted->largest(), job.true_peak(one.plan)) << i << " " << one.plan.micro_batch;
            predicted += one.measured ? 0 : 1;
            if (one.measured && one.plan.micro_batch > 2) {
                EXPECT_LE(one.predicted->largest(), options.budget_bytes) << i;
            }
        }
    }
    EXPECT_GT(predicted, 1000);
}

TEST(PlannerSearch, NeverChoosesWhatDoesNotFitWhateverTheJobAllocates) {
    std::mt19937_64 random(4);
    int refused = 0, surprised = 0;
    for (int i = 0; i < 1500; ++i) {
        auto [job, options] = draw_job(random);
        const std::int64_t jump = 2 + static_cast<std::int64_t>(random() % 60);
        const auto salt = static_cast<std::int64_t>(1 + random() % 5000);
        job.surprise = [=](std::int64_t b) { return (b >= jump ? salt : 0) + b * 7919 % (1 + salt / 4); };
        if (i % 2 == 0) job.extra_allocations = [&random] { return static_cast<std::size_t>(random() % 3); };
        if (i % 3 == 0) job.out_of_memory_from = 3 + static_cast<std::int64_t>(random() % 100);
        const PlanReport report = plan(job, options);
        expect_sound(job, options, report);
        surprised += report.affine ? 0 : 1;
        refused += report.chosen ? 0 : 1;
        if (!report.chosen) continue;
        EXPECT_LE(job.true_peak(report.choice().plan), options.budget_bytes) << i;
        EXPECT_LT(report.choice().plan.micro_batch, job.out_of_memory_from) << i;
    }
    EXPECT_GT(surprised, 300);
    EXPECT_GT(refused, 10);
}

TEST(PlannerSearch, EndsWhateverTheTimesAndBytesAre) {
    std::mt19937_64 random(5);
    const std::vector<double> times = {0.0, nan_value, infinity, -1.0, 1e-300, 1e300, 1.0};
    for (int i = 0; i < 500; ++i) {
        FakeJob job;
        const auto any_time = [&] { return times[random() % times.size()]; };
        job.time = [&](std::int64_t) { return any_time(); };
        job.update_seconds = any_time();
        job.surprise = [&](std::int64_t) { return static_cast<std::int64_t>(random() % 3000); };
        const std::vector<std::int64_t> batches = {1, 2, 3, 5, 100, largest_int64 - 1, largest_int64};
        const PlannerOptions options{
            .batch = batches[random() % batches.size()],
            .budget_bytes = i % 7 == 0 ? largest_int64 : 4000 + static_cast<std::int64_t>(random() % 9000),
            .offers_recompute = i % 2 == 0};
        expect_sound(job, options, plan(job, options));
    }
}

TEST(PlannerSearch, NoiseOfTheClockCostsLittle) {
    std::mt19937_64 random(6);
    std::vector<double> excess;
    for (int i = 0; i < 1000; ++i) {
        auto [job, options] = draw_job(random);
        FakeJob noisy = job;
        noisy.time = [&, time = job.time](std::int64_t b) {
            return time(b) * std::uniform_real_distribution<double>(0.98, 1.02)(random);
        };
        const PlanReport report = plan(noisy, options);
        expect_sound(noisy, options, report);
        excess.push_back(job.step_seconds(report.choice().plan) / best_of_all(job, options) - 1);
    }
    std::sort(excess.begin(), excess.end());
    // Two plans may each be off by 2 %, and a tie is 1 %, in addition to the 5 %.
    EXPECT_LE(excess[950], 0.08);
    EXPECT_LE(excess[500], 0.02);
}

TEST(PlannerSearch, ContinuesWhereTheFirstSizesWereDisturbed) {
    FakeJob job;
    job.batch = 512;
    job.time = [](std::int64_t b) {
        const auto samples = static_cast<double>(b);
        return b > 1 && b < 10 ? 3e-3 * samples : 1e-3 + 1e-4 * samples;
    };
    const PlanReport report = plan(job, {.batch = 512, .budget_bytes = 1 << 30});
    EXPECT_GE(report.choice().plan.micro_batch, 64);
}

// A neighbour on the machine: one sample in four takes up to half as long again.
TEST(PlannerSearch, TurnsTellTheFastestPlanOnAMachineThatOthersUse) {
    std::mt19937_64 random(7);
    std::vector<double> excess;
    int timed_again = 0;
    for (int i = 0; i < 1000; ++i) {
        auto [job, options] = draw_job(random);
        options.least_seconds = 1e9;  // as long as it takes: what is tested is what the turns make of it
        FakeJob noisy = job;
        noisy.time = [&, time = job.time](std::int64_t b) {
            const double disturbance = std::uniform_real_distribution<double>(-1.5, 0.5)(random);
            return time(b) * (1.0 + std::max(disturbance, 0.0));
        };
        const PlanReport report = plan(noisy, options);
        expect_sound(noisy, options, report);
        timed_again += noisy.timed_again;
        excess.push_back(job.step_seconds(report.choice().plan) / best_of_all(job, options) - 1);
    }
    std::sort(excess.begin(), excess.end());
    EXPECT_GT(timed_again, 1000);
    EXPECT_LE(excess[950], 0.05);
}

}  // namespace
}  // namespace microbatch
