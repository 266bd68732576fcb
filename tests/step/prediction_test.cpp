// The predictions from planning on a live job match the measurements, and a job that does not fit is explained.
#include <ATen/ATen.h>

#include <algorithm>
#include <functional>
#include <string>

#include "support/device_memory.h"
#include "support/errors.h"
#include "support/planning.h"

namespace microbatch {
namespace {

using namespace test;
using Prediction = Planning;

/// The peak of the second of two steps by this plan, with everything that is live.
std::int64_t peak_of_two_steps(Job& job, const Batch& batch, const Plan& plan) {
    job.accumulator->set_plan(plan);
    test::reset_peak_memory();
    for (int step = 0; step < 2; ++step) job.accumulator->step(batch, job.loss);
    return test::memory_use().peak_bytes;
}

struct Case {
    const char* name;
    std::function<Job(const std::string&)> make;
    std::vector<std::int64_t> sizes;  // planning tries none of these
    bool recompute;
};

// The smaller version of bench/memory. Bar: 3 %.
TEST_F(Prediction, PredictsThePeakOfMicroBatchesThatItHasNotTried) {
    const auto gpt = [](const std::string& optimizer) {
        return test::gpt_job({.layers = 3, .heads = 2, .width = 64, .length = 32, .vocabulary = 256}, {}, optimizer);
    };
    const auto resnet = [](const std::string& optimizer) {
        return test::resnet_job({.classes = 10, .width = 16, .blocks = 1, .norm = ImageNorm::group}, {}, optimizer);
    };
    const auto batch_norm = [](const std::string& optimizer) {
        return test::resnet_job({.classes = 10, .width = 16, .blocks = 1}, {}, optimizer);
    };
    const auto mlp = [](const std::string& optimizer) {
        return test::mlp_job({.inputs = 256, .width = 128, .classes = 10}, {}, optimizer);
    };
    const std::vector<Case> cases{{"gpt", gpt, {8, 32}, false},           {"gpt", gpt, {8, 32}, true},
                                  {"resnet", resnet, {8, 32}, false},     {"resnet", resnet, {8, 32}, true},
                                  {"batch norm", batch_norm, {16}, true}, {"mlp", mlp, {16, 256}, false}};
    for (const Case& one : cases) {
        for (const char* optimizer : {"adamw", "sgd"}) {
            for (const std::int64_t size : one.sizes) {
                SCOPED_TRACE(::testing::Message() << one.name << ", " << optimizer << ", micro-batch " << size);
                Job job = one.make(optimizer);
                const Batch batch = job.make_batch(2 * size);
                const PlanReport report = plan_of(job, batch,
                                                  {.recompute = one.recompute ? Recompute::always : Recompute::never,
                                                   .most_steps = 0.0,
                                                   .least_seconds = 0.0});
                const auto row = std::find_if(report.candidates.begin(), report.candidates.end(),
                                              [size](const Candidate& each) { return each.plan.micro_batch == size; });
                ASSERT_NE(row, report.candidates.end());
                ASSERT_FALSE(row->time_measured);
                const auto measured = static_cast<double>(peak_of_two_steps(job, batch, row->plan));
                EXPECT_NEAR(static_cast<double>(row->peak_bytes()), measured, 0.03 * measured);
            }
        }
    }
}

TEST_F(Prediction, ThePeakDoesNotGrowWithTheNumberOfMicroBatches) {
    std::int64_t of_two = 0;
    for (const std::int64_t count : {2, 3, 8, 64}) {
        Job job = test::gpt_job(small_gpt());
        const Batch batch = job.make_batch(2 * count);
        std::int64_t batch_bytes = 0;
        for (const at::Tensor& field : batch.fields) batch_bytes += static_cast<std::int64_t>(field.nbytes());
        const std::int64_t peak = peak_of_two_steps(job, batch, {.micro_batch = 2}) - batch_bytes;
        if (count == 2) of_two = peak;
        EXPECT_NEAR(static_cast<double>(peak), static_cast<double>(of_two), 0.01 * static_cast<double>(of_two));
    }
}

TEST_F(Prediction, TheBudgetHoldsToTheByte) {
    Job job = test::gpt_job(small_gpt());
    const Batch batch = job.make_batch(16);
    for (const std::int64_t asked : {std::int64_t{3'000'000}, std::int64_t{2'000'000}, std::int64_t{1'300'000}}) {
        Job fresh = test::gpt_job(small_gpt());
        const PlanReport report = plan_of(fresh, batch, {.budget_bytes = asked});
        ASSERT_TRUE(report.chosen) << asked;
        const std::int64_t needed = report.choice().peak_bytes();
        EXPECT_LE(needed, asked);
        {
            const test::BudgetScope scope(needed);
            EXPECT_EQ(peak_of_two_steps(fresh, batch, report.choice().plan), needed);
            EXPECT_EQ(fresh.accumulator->step(batch, fresh.loss).out_of_memory, 0);
        }
        const test::BudgetScope scope(needed - 1);
        EXPECT_GT(fresh.accumulator->step(batch, fresh.loss).out_of_memory, 0);
    }
}

TEST_F(Prediction, AModelThatAllocatesDifferentlyEveryTimeIsPlannedAllTheSame) {
    Job job = test::gpt_job(small_gpt(0.0));
    const Batch batch = job.make_batch(16);
    int calls = 0;
    const LossFunction loss = [&](const Batch& micro) -> WeightedLoss {
        const int odd = ++calls * 7919 % 13;
        std::vector<at::Tensor> scratch;
        for (int i = 0; i < odd; ++i) scratch.push_back(at::empty({1000 + 100 * odd}));
        return job.loss(micro);
    };
    const PlanReport report = plan_batch(*job.accumulator, batch, loss, {.budget_bytes = 1024 * mebibyte});
    EXPECT_TRUE(report.chosen);
    EXPECT_FALSE(report.affine);
    EXPECT_TRUE(report.choice().time_measured);
}

// ---- what does not fit ----

TEST_F(Prediction, ABudgetBelowTheParametersIsExplained) {
    Job job = test::gpt_job(small_gpt());
    const Batch batch = job.make_batch(8);
    const PlanReport report = plan_of(job, batch, {.budget_bytes = 1000, .most_bytes = 1024 * mebibyte});
    EXPECT_FALSE(report.chosen);
    const std::string message = test::error_message(ErrorKind::does_not_fit, [&] { report.choice(); });
    for (const char* part :
         {"parameters", "gradients", "optimizer state", "activations", "1 sample", "what would help"}) {
        EXPECT_NE(message.find(part), std::string::npos) << part << " is not in: " << message;
    }
    const Candidate* least = smallest(report);
    ASSERT_NE(least, nullptr);
    // The whole truth: with exactly that budget it runs.
    Job again = test::gpt_job(small_gpt());
    const std::int64_t elsewhere = test::memory_use().live_bytes - report.fixed.parameters - report.fixed.other;
    const test::BudgetScope budget(least->peak_bytes() + elsewhere);
    again.accumulator->set_plan(least->plan);
    for (int i = 0; i < 2; ++i) EXPECT_EQ(again.accumulator->step(batch, again.loss).out_of_memory, 0);
}

TEST_F(Prediction, RefusesInvalidOptions) {
    Job job = test::gpt_job(small_gpt());
    test::expect_usage_error({"empty"}, [&] { plan_of(job, {}); });
    const Batch batch = job.make_batch(2);
    test::expect_usage_error({"budget"}, [&] { plan_of(job, batch, {.budget_bytes = -1}); });
    test::expect_usage_error({"micro-batch", "3"}, [&] { plan_of(job, batch, {.micro_batch = 3}); });
    Job mlp = test::mlp_job({.inputs = 4, .classes = 2});
    test::expect_usage_error({"recompute"}, [&] { plan_of(mlp, mlp.make_batch(2), {.recompute = Recompute::always}); });
}

// ---- sequences of different lengths ----

/// Samples of different lengths, padded to the longest of a batch.
class Ragged final : public Dataset {
public:
    std::int64_t size() const override { return 10; }
    std::int64_t longest_sample() const override { return 7; }
    Batch get(std::span<const std::int64_t> indices) const override {
        std::int64_t longest = 0;
        for (const std::int64_t index : indices) longest = std::max(longest, length_of(index));
        const auto samples = static_cast<std::int64_t>(indices.size());
        return {{at::ones({samples, longest}, at::kLong), at::ones({samples, longest}, at::kLong)}};
    }

private:
    static std::int64_t length_of(std::int64_t index) { return index == 7 ? 16 : 1 + index; }
};

TEST_F(Prediction, PlansForTheLongestShapeThatTheDataHolds) {
    const Ragged data;
    const DatasetBatch longest = DatasetBatch::longest(data, 4);
    EXPECT_EQ(longest.size(), 4);
    EXPECT_EQ(longest.fetch({0, 4}).fields[0].size(1), 16);
    Job job = test::gpt_job(small_gpt());
    const PlanReport report = plan_batch(*job.accumulator, longest, job.loss, {.budget_bytes = 2 * mebibyte});
    const test::BudgetScope budget(report.choice().peak_bytes());
    job.accumulator->set_plan(report.choice().plan);
    for (std::int64_t i = 0; i + 4 <= data.size(); ++i) {
        const DatasetBatch batch(data, {i, i + 1, i + 2, i + 3});
        EXPECT_EQ(job.accumulator->step(batch, job.loss).out_of_memory, 0);
    }
}

}  // namespace
}  // namespace microbatch
