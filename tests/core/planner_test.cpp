#include "microbatch/core/planner.h"

#include <gtest/gtest.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "support/errors.h"
#include "support/fake_job.h"

namespace microbatch {
namespace {

using namespace test;

TEST(Planner, TakesTheWholeBatchWhereItFitsAndSaysThatNothingIsSplit) {
    for (const std::int64_t batch : {1, 2, 3, 7, 64, 100}) {
        FakeJob job;
        job.time = curve(0.1, 1e9, 0);
        const PlanReport report = plan(job, {.batch = batch, .budget_bytes = 1 << 30});
        EXPECT_EQ(report.choice().plan, (Plan{.micro_batch = batch}));
        EXPECT_EQ(report.why, "the whole batch fits and nothing is faster: no accumulation needed");
        EXPECT_EQ(report.choice().measured->later_micro_batches, 0);
    }
}

TEST(Planner, UsesTheBudgetToTheByte) {
    for (const std::int64_t count : {2, 3, 4, 10}) {
        FakeJob job;
        job.batch = 120;
        job.time = curve(1.0, 1e9, 0);
        const Plan even{.micro_batch = 120 / count};
        const std::int64_t needed = job.true_peak(even);
        EXPECT_EQ(plan(job, {.batch = 120, .budget_bytes = needed}).choice().plan, even);
        FakeJob again;
        again.time = job.time;
        EXPECT_EQ(plan(again, {.batch = 120, .budget_bytes = needed - 1}).choice().micro_batches, count + 1);
    }
}

TEST(Planner, CutsEvenlyWhereTheLastMicroBatchWouldBeSmall) {
    FakeJob job;
    job.batch = 100;
    job.time = curve(1.0, 1e9, 0);
    const PlanReport report = plan(job, {.batch = 100, .budget_bytes = job.true_peak({.micro_batch = 80})});
    EXPECT_EQ(report.choice().plan.micro_batch, 50);
}

TEST(Planner, ATieGoesToTheSmallerPeak) {
    for (const auto& [overhead, expected] : {std::pair{0.0001, 1}, {0.003, 2}}) {
        FakeJob job;
        job.time = curve(overhead, 1e9, 0);
        job.gradients = 0;  // otherwise the whole batch, whose forward pass holds none, would be smaller
        job.update_seconds = 0;
        EXPECT_EQ(plan(job, {.batch = 2, .budget_bytes = 1 << 30}).choice().plan.micro_batch, expected) << overhead;
    }
}

TEST(Planner, TakesTheWholeBatchWhereNotEvenOneSampleFitsOtherwise) {
    FakeJob job;
    job.batch = 8;
    job.state = 0;
    job.update_extra = 0;
    job.gradients = 5000;
    const std::int64_t budget = job.true_peak({.micro_batch = 8});
    ASSERT_GT(job.true_peak({.micro_batch = 1}), budget);
    const PlanReport report = plan(job, {.batch = 8, .budget_bytes = budget});
    EXPECT_EQ(report.choice().plan.micro_batch, 8);
    EXPECT_TRUE(report.choice().measured);
}

TEST(Planner, PrefersAnWholeBatchThatFitsToRecomputeThatFitsInPieces) {
    FakeJob job;
    job.batch = 8;
    job.state = 0;
    job.gradients = 5000;
    const std::int64_t budget = job.true_peak({.micro_batch = 1, .recompute = true});
    ASSERT_GT(job.true_peak({.micro_batch = 1}), budget);
    const PlanReport report = plan(job, {.batch = 8, .budget_bytes = budget, .offers_recompute = true});
    EXPECT_EQ(report.choice().plan, (Plan{.micro_batch = 8}));
}

TEST(Planner, RecomputesWhereNothingElseFits) {
    FakeJob job;
    job.lines = one_line(0, 4000);
    job.batch = 8;
    const std::int64_t budget = job.true_peak({.micro_batch = 2, .recompute = true});
    const PlanReport report = plan(job, {.batch = 8, .budget_bytes = budget, .offers_recompute = true});
    EXPECT_EQ(report.choice().plan, (Plan{.micro_batch = 2, .recompute = true}));
    EXPECT_NE(report.why.find("without recompute it does not fit"), std::string::npos) << report.why;

    FakeJob never = FakeJob();
    never.lines = job.lines;
    const PlannerOptions options{
        .batch = 8, .budget_bytes = budget, .offers_recompute = true, .recompute = Recompute::never};
    EXPECT_FALSE(plan(never, options).chosen);
    EXPECT_FALSE(never.was_asked(1, true));
    FakeJob not_offered = FakeJob();
    not_offered.lines = job.lines;
    EXPECT_FALSE(plan(not_offered, {.batch = 8, .budget_bytes = budget}).chosen);
    EXPECT_FALSE(not_offered.was_asked(1, true));
}

TEST(Planner, RecomputesWhereTheLargerMicroBatchMakesUpForIt) {
    FakeJob job;
    job.batch = 64;
    job.lines = one_line(0, 4000);
    job.time = curve(0.1, 1e9, 0);
    const std::int64_t budget = job.true_peak({.micro_batch = 4});
    const PlanReport report = plan(job, {.batch = 64, .budget_bytes = budget, .offers_recompute = true});
    EXPECT_EQ(report.choice().plan, (Plan{.micro_batch = 16, .recompute = true}));
    EXPECT_NE(report.why.find("recompute makes room for it"), std::string::npos) << report.why;
}

TEST(Planner, LooksAtRecomputeOnlyWhereASecondForwardPassCouldPayOrAWholeTableIsAskedFor) {
    for (const bool whole_table : {false, true}) {
        // At 4 samples the fixed part is 2.5 % of the rest, or 2.5 times as much.
        for (const double fixed_seconds : {0.001, 0.1}) {
            FakeJob job;
            job.batch = 64;
            job.lines = one_line(0, 4000);
            job.time = [=](std::int64_t b) { return fixed_seconds + 1e-2 * static_cast<double>(b); };
            const bool pays = fixed_seconds > 0.01;
            const PlanReport report = plan(job, {.batch = 64,
                                                 .budget_bytes = job.true_peak({.micro_batch = 4}),
                                                 .offers_recompute = true,
                                                 .whole_table = whole_table});
            EXPECT_EQ(job.was_asked(1, true), pays || whole_table);
            EXPECT_EQ(job.was_asked(2, true), pays || whole_table);
            EXPECT_EQ(report.choice().plan.recompute, pays);
        }
    }
}

TEST(Planner, AlwaysRecomputesWhereThatIsAsked) {
    FakeJob job;
    const PlanReport report =
        plan(job, {.batch = 8, .budget_bytes = 1 << 20, .offers_recompute = true, .recompute = Recompute::always});
    EXPECT_TRUE(report.choice().plan.recompute);
    for (const Plan& one : job.asked) EXPECT_TRUE(one.recompute);
}

TEST(Planner, LooksAtTheGivenMicroBatchAlone) {
    FakeJob job;
    const PlanReport report = plan(job, {.batch = 64, .budget_bytes = 1 << 20, .micro_batch = 12});
    EXPECT_EQ(job.asked, (std::vector<Plan>{{.micro_batch = 12}}));
    EXPECT_EQ(report.choice().plan.micro_batch, 12);
    EXPECT_EQ(report.choice().micro_batches, 6);
    EXPECT_EQ(report.why, "as given");

    FakeJob tight;
    tight.batch = 64;
    const std::int64_t budget = tight.true_peak({.micro_batch = 12}) - 1;
    const PlanReport second =
        plan(tight, {.batch = 64, .budget_bytes = budget, .offers_recompute = true, .micro_batch = 12});
    EXPECT_EQ(second.choice().plan, (Plan{.micro_batch = 12, .recompute = true}));
    FakeJob none;
    const PlanReport third = plan(none, {.batch = 64, .budget_bytes = 10, .micro_batch = 12});
    EXPECT_FALSE(third.chosen);
    EXPECT_NE(explain_misfit(third).find("12 samples"), std::string::npos) << explain_misfit(third);
}

TEST(Planner, ARunOfOneStepHoldsNoOptimizerStateDuringItsMicroBatches) {
    FakeJob job;
    job.batch = 1;
    job.lines = one_line(3000, 0);
    const std::int64_t one_step = job.update_peak();
    FakeJob again = job;
    EXPECT_TRUE(plan(job, {.batch = 1, .budget_bytes = one_step, .steps = 1}).chosen);
    EXPECT_FALSE(plan(again, {.batch = 1, .budget_bytes = one_step, .steps = 2}).chosen);
}

TEST(Planner, StopsWhereTheOptimizerStepAloneDoesNotFit) {
    FakeJob job;
    job.state = 1'000'000;
    const PlanReport report =
        plan(job, {.batch = 64, .budget_bytes = 500'000, .offers_recompute = true, .most_bytes = 10'000'000});
    EXPECT_FALSE(report.chosen);
    EXPECT_EQ(job.updates, 2);
    EXPECT_EQ(smallest(report)->peak_bytes(), job.true_peak({.micro_batch = 1, .recompute = true}));
    EXPECT_EQ(report.fixed.optimizer_state, 1'000'000);

    FakeJob largest_in_the_update;
    largest_in_the_update.state = 1'000'000;
    largest_in_the_update.update_extra = 10'000;
    EXPECT_FALSE(plan(largest_in_the_update,
                      {.batch = 64, .budget_bytes = 500'000, .offers_recompute = true, .most_bytes = 10'000'000})
                     .chosen);
    EXPECT_EQ(largest_in_the_update.asked.size(), 1U) << "no other plan can need less";

    FakeJob unknown;
    unknown.state = 1'000'000;
    const PlanReport second = plan(unknown, {.batch = 64, .budget_bytes = 500'000});
    EXPECT_EQ(unknown.asked.size(), 1U);
    EXPECT_EQ(smallest(second), nullptr);
    EXPECT_NE(explain_misfit(second).find("optimizer's step"), std::string::npos);
}

TEST(Planner, SaysWhatTheSmallestNeedsWhereThatIsKnownOnlyBeyondTheBudget) {
    FakeJob job;
    const PlanReport report = plan(job, {.batch = 64, .budget_bytes = 500, .most_bytes = 1 << 20});
    EXPECT_FALSE(report.chosen);
    ASSERT_NE(smallest(report), nullptr);
    EXPECT_EQ(parts_of(report, *smallest(report)),
              (MemoryParts{.parameters = 1000, .gradients = 1000, .optimizer_state = 2000, .activations = 150}));
}

// Gradients larger than all activations: an output layer over a large vocabulary.
TEST(Planner, NamesTheWholeBatchAsTheLeastWhereGradientsAreLargerThanActivations) {
    FakeJob job;
    job.batch = 8;
    job.gradients = job.state = 50'000;
    job.update_extra = 0;
    job.lines = one_line(40'000, 2000);
    const Plan uncut{.micro_batch = 8, .recompute = true};
    const std::int64_t needed = job.true_peak(uncut);
    ASSERT_LT(needed, job.true_peak({.micro_batch = 1, .recompute = true}));
    FakeJob enough = job;
    const PlannerOptions options{
        .batch = 8, .budget_bytes = needed - 1, .offers_recompute = true, .most_bytes = 1 << 20};
    const PlanReport report = plan(job, options);
    EXPECT_FALSE(report.chosen);
    EXPECT_EQ(smallest(report)->plan, uncut);
    EXPECT_EQ(smallest(report)->peak_bytes(), needed);
    EXPECT_EQ(plan(enough, {.batch = 8, .budget_bytes = needed, .offers_recompute = true}).choice().plan, uncut);
}

TEST(Planner, ALeastThatIsNotKnownToFitInTheMachineIsNotNamed) {
    FakeJob job;
    const PlanReport report =
        plan(job, {.batch = 64, .budget_bytes = 500, .offers_recompute = true, .most_bytes = 4000});
    EXPECT_EQ(smallest(report), nullptr);
    EXPECT_NE(explain_misfit(report).find("not enough memory to measure"), std::string::npos) << explain_misfit(report);
}

TEST(Planner, NamesTheLeastOfAGivenMicroBatchWithRecomputeOrWithout) {
    for (const double recompute_memory : {0.25, 2.0}) {
        FakeJob job;
        job.recompute_memory = recompute_memory;
        const PlanReport report = plan(
            job,
            {.batch = 64, .budget_bytes = 500, .offers_recompute = true, .micro_batch = 12, .most_bytes = 1 << 20});
        const Plan least{.micro_batch = 12, .recompute = recompute_memory < 1};
        EXPECT_EQ(smallest(report)->plan, least);
        EXPECT_EQ(smallest(report)->peak_bytes(), job.true_peak(least));
    }
}

TEST(Planner, BeginsAtTheSmallestMicroBatchThatTheModelCanTrainOn) {
    for (const auto& [batch, smallest] : {std::pair{64, 2}, {65, 3}, {4, 2}, {3, 3}, {2, 2}}) {
        for (const std::int64_t budget : {std::int64_t{1} << 20, std::int64_t{4260}}) {
            FakeJob job;
            job.fewest = 2;
            const PlannerOptions options{.batch = batch, .budget_bytes = budget, .most_bytes = 1 << 20};
            const PlanReport report = plan(job, options);
            expect_sound(job, options, report);
            EXPECT_TRUE(report.chosen || budget < 5000) << batch;
            for (const Candidate& one : report.candidates) EXPECT_GE(one.plan.micro_batch, smallest) << batch;
            ASSERT_NE(microbatch::smallest(report), nullptr);
        }
    }
}

TEST(Planner, ABatchOrAGivenMicroBatchThatTheModelCannotTrainOnIsAnError) {
    FakeJob of_one, in_ones, never;
    of_one.fewest = in_ones.fewest = 2;
    never.fewest = 100;
    EXPECT_THROW(plan(of_one, {.batch = 1, .budget_bytes = 1 << 20}), TooFewSamples);
    EXPECT_THROW(plan(in_ones, {.batch = 8, .budget_bytes = 1 << 20, .micro_batch = 1}), TooFewSamples);
    EXPECT_THROW(plan(never, {.batch = 8, .budget_bytes = 1 << 20}), TooFewSamples);
}

TEST(Planner, ABatchAtTheEndOfInt64IsSplitLikeAnyOther) {
    FakeJob job;
    job.time = curve(1.0, 64, 0.05);
    const PlannerOptions options{.batch = largest_int64, .budget_bytes = 1 << 30};
    const PlanReport report = plan(job, options);
    expect_sound(job, options, report);
    EXPECT_GT(report.choice().plan.micro_batch, 64);
    EXPECT_EQ(report.candidates.back().peak_bytes(), largest_int64);
}

TEST(Planner, AClockThatReadsZeroStillEndsInAChoice) {
    FakeJob job;
    job.time = [](std::int64_t) { return 0.0; };
    job.update_seconds = 0.0;
    const PlanReport report = plan(job, {.batch = 1000, .budget_bytes = 1 << 20, .offers_recompute = true});
    EXPECT_TRUE(report.chosen);
    EXPECT_LE(job.asked.size(), 6U);
}

TEST(Planner, CallsOnTrialBeforeEachTrialAndPassesOnWhatItThrows) {
    FakeJob job;
    std::vector<Plan> told;
    const auto tell = [&](const Plan& one) {
        EXPECT_EQ(told.size(), job.asked.size() + static_cast<std::size_t>(job.timed_again));
        told.push_back(one);
    };
    plan(job, {.batch = 64, .budget_bytes = 1 << 20, .offers_recompute = true, .on_trial = tell});
    EXPECT_EQ(told.size(), job.asked.size() + static_cast<std::size_t>(job.timed_again));
    told.resize(job.asked.size());  // the plans that are timed again come last
    EXPECT_EQ(told, job.asked);
    FakeJob stopped;
    const auto stop = [&](const Plan& one) {
        if (one.micro_batch == 2) throw std::domain_error("enough");
    };
    EXPECT_THROW(plan(stopped, {.batch = 64, .budget_bytes = 1 << 20, .on_trial = stop}), std::domain_error);
    EXPECT_EQ(stopped.asked.size(), 1U);
}

TEST(Planner, RefusesOptionsThatMeanNothing) {
    FakeJob job;
    expect_usage_error({"batch is 0"}, [&] { make_plan({.batch = 0, .budget_bytes = 1}, job); });
    expect_usage_error({"batch is -3"}, [&] { make_plan({.batch = -3, .budget_bytes = 1}, job); });
    expect_usage_error({"budget", " 0;"}, [&] { make_plan({.batch = 1, .budget_bytes = 0}, job); });
    expect_usage_error({"steps is 0"}, [&] { make_plan({.batch = 1, .budget_bytes = 1, .steps = 0}, job); });
    for (const std::int64_t size : {std::int64_t{0}, std::int64_t{9}}) {
        expect_usage_error({"micro-batch is", "from 1 to the batch"},
                           [&] { make_plan({.batch = 8, .budget_bytes = 1, .micro_batch = size}, job); });
    }
    expect_usage_error({"does not support it"},
                       [&] { make_plan({.batch = 8, .budget_bytes = 1, .recompute = Recompute::always}, job); });
    EXPECT_TRUE(job.asked.empty());
}

}  // namespace
}  // namespace microbatch
