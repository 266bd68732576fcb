#include "microbatch/core/plan_report.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "support/errors.h"

namespace microbatch {
namespace {

using test::error_message;
using test::expect_usage_error;

constexpr std::int64_t mib = std::int64_t{1} << 20U;

Candidate candidate(std::int64_t size, std::int64_t batch, const PhasePeaks& peaks, bool fits) {
    return {.plan = {.micro_batch = size},
            .micro_batches = micro_batch_count(batch, size),
            .measured = peaks,
            .fits = fits};
}

PlanReport report_of(std::vector<Candidate> candidates) {
    return {.batch = 8,
            .budget_bytes = 10 * mib,
            .candidates = std::move(candidates),
            .fixed = {.parameters = 2 * mib, .gradients = 3 * mib, .optimizer_state = 4 * mib, .other = mib}};
}

void expect_parts(const std::string& text, const std::vector<std::string>& parts) {
    for (const std::string& part : parts)
        EXPECT_NE(text.find(part), std::string::npos) << part << " is not in " << text;
}

TEST(PlanReport, ThePeakIsThatOfTheLargestPhaseMeasuredBeforePredicted) {
    for (const PhasePeaks& peaks : {PhasePeaks{9, 1, 2, 3}, {1, 9, 2, 3}, {1, 2, 9, 3}, {1, 2, 3, 9}}) {
        EXPECT_EQ(peaks.largest(), 9);
    }
    Candidate one;
    one.predicted = PhasePeaks{5, 0, 0, 0};
    EXPECT_EQ(one.peak_bytes(), 5);
    one.measured = PhasePeaks{7, 0, 0, 0};
    EXPECT_EQ(one.peak_bytes(), 7);
    EXPECT_EQ(Candidate{}.peak_bytes(), 0);
}

TEST(PlanReport, ThePartsOfAPeakAreThoseOfItsPhase) {
    const auto parts = [](const PhasePeaks& peaks) {
        const PlanReport report = report_of({candidate(1, 8, peaks, false)});
        return parts_of(report, report.candidates[0]);
    };
    MemoryParts expected{
        .parameters = 2 * mib, .gradients = 3 * mib, .optimizer_state = 4 * mib, .other = mib, .activations = 5 * mib};
    EXPECT_EQ(parts({14 * mib, 15 * mib, 11 * mib, 11 * mib}), expected);
    EXPECT_EQ(parts({15 * mib, 15 * mib, 11 * mib, 11 * mib}), expected) << "the gradients are there, too";
    EXPECT_EQ(parts({1, 2, 15 * mib, 3}), expected);
    // One step: no state during its micro-batches.
    expected.optimizer_state = 0;
    EXPECT_EQ(parts({1, 11 * mib, 10 * mib, 0}), expected);
    expected.gradients = 0;
    EXPECT_EQ(parts({8 * mib, 0, 7 * mib, 0}), expected) << "gradients that are being made count as activations";
    EXPECT_EQ(parts({1, 0, 1, 1}).activations, 0);
    const PlanReport unknown = report_of({Candidate{.plan = {.micro_batch = 4}}});
    expect_usage_error({"micro-batch of 4"}, [&] { parts_of(unknown, unknown.candidates[0]); });
}

TEST(PlanReport, TheSmallestIsTheSmallestThatIsKnown) {
    EXPECT_EQ(smallest(report_of({})), nullptr);
    // The first is not known; the third was predicted to fit and did not.
    const PlanReport report =
        report_of({Candidate{.plan = {.micro_batch = 1}}, candidate(2, 8, {20 * mib, 0, 0, 0}, false),
                   candidate(3, 8, {9 * mib, 0, 0, 0}, false), candidate(4, 8, {12 * mib, 0, 0, 0}, false)});
    EXPECT_EQ(smallest(report), &report.candidates[3]);
}

TEST(PlanReport, NamesAllPartsOfTheSmallestPeakAndWhatWouldHelp) {
    const PlanReport report = report_of({candidate(1, 8, {14 * mib, 15 * mib, 11 * mib, 11 * mib}, false)});
    const std::string message = error_message(ErrorKind::does_not_fit, [&] { report.choice(); });
    EXPECT_EQ(message, explain_misfit(report));
    expect_parts(message,
                 {"micro-batch of 1 sample,", "needs 15 MiB, 5 MiB more", "budget of 10 MiB", "parameters       2 MiB",
                  "gradients        3 MiB", "optimizer state  4 MiB", "activations      5 MiB of 1 sample",
                  "other            1 MiB", "a budget of 15 MiB", "shorter or smaller samples", "a smaller model"});
    EXPECT_EQ(message.find("less state"), std::string::npos) << "4 MiB less would not do";
    EXPECT_EQ(message.find("smaller batch"), std::string::npos);
}

TEST(PlanReport, AdvisesLessStateOrASmallerBatchWhereThatIsEnough) {
    const PlanReport report = report_of({candidate(2, 8, {1, 11 * mib, 0, 1}, false)});
    expect_parts(explain_misfit(report), {"2 samples", "an optimizer that keeps less state", "a smaller batch"});
}

TEST(PlanReport, SaysThatTheSmallestPeakIsNotKnownWhereItIsNot) {
    expect_parts(explain_misfit(report_of({})),
                 {"1 sample ", "10 MiB", "not enough memory to measure", "a larger budget"});
    expect_parts(explain_misfit(report_of({Candidate{.plan = {.micro_batch = 6}}})), {"6 samples"});
}

TEST(PlanReport, SaysWhyThePlanWasChosen) {
    EXPECT_EQ(explain_choice(report_of({}), false, false), "nothing fits");
    PlanReport report = report_of({candidate(4, 8, {mib, 0, 0, 0}, true), candidate(8, 8, {2 * mib, 0, 0, 0}, true)});
    report.chosen = 1;
    EXPECT_EQ(explain_choice(report, false, false),
              "the whole batch fits and nothing is faster: no accumulation needed");
    report.chosen = 0;
    EXPECT_EQ(explain_choice(report, false, false), "the fastest; the whole batch would also fit, but is not faster");
    EXPECT_EQ(explain_choice(report, true, false), "as given");
    report.candidates[1] = candidate(8, 8, {20 * mib, 0, 0, 0}, false);
    EXPECT_EQ(explain_choice(report, false, false), "the fastest that fits; the whole batch would need 20 MiB");
    report.candidates[1].measured.reset();
    EXPECT_EQ(explain_choice(report, false, false), "the fastest that fits");
    report.candidates[0].plan.recompute = true;
    EXPECT_EQ(explain_choice(report, true, false), "as given; without recompute it does not fit");
    EXPECT_EQ(explain_choice(report, true, true), "as given");
    report.candidates.push_back(candidate(1, 8, {mib, 0, 0, 0}, true));
    EXPECT_EQ(explain_choice(report, true, false), "as given; recompute makes room for it");
}

}  // namespace
}  // namespace microbatch
