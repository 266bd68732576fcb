// Planning on a live job: what is predicted is what is then measured, and no trace is left.
#include "microbatch/train/probe.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/optim/adamw.h>

#include <chrono>
#include <limits>
#include <stdexcept>
#include <string>
#include <thread>

#include "microbatch/memory/budget_allocator.h"
#include "microbatch/nn/recompute.h"
#include "microbatch/optim/torch_optimizer.h"
#include "support/errors.h"
#include "support/gradients.h"
#include "support/jobs.h"
#include "support/one_thread.h"

namespace microbatch {
namespace {

using test::Job;
using test::Named;

constexpr std::int64_t mebibyte = std::int64_t{1} << 20;

GptConfig small_gpt(double dropout = 0.1) {
    return {.layers = 2, .heads = 2, .width = 32, .length = 16, .vocabulary = 64, .dropout = dropout};
}

class ProbeTest : public ::testing::Test {
protected:
    static void SetUpTestSuite() { install_budget_allocator(); }
};

PlanReport plan_of(Job& job, const Batch& batch, PlannerOptions options = {}) {
    if (options.budget_bytes == 0) options.budget_bytes = 1024 * mebibyte;
    return plan_batch(*job.accumulator, batch, job.loss, options);
}

/// The peak of the second of two steps by this plan, with everything that is live.
std::int64_t peak_of_two_steps(Job& job, const Batch& batch, const Plan& plan) {
    job.accumulator->set_plan(plan);
    reset_peak_memory();
    for (int step = 0; step < 2; ++step) job.accumulator->step(batch, job.loss);
    return memory_use().peak_bytes;
}

// ---- no trace ----

void expect_no_trace(const std::function<Job()>& make, int steps_before) {
    Job probed = make(), other = make();
    for (Job* job : {&probed, &other}) {
        at::manual_seed(7);
        const Batch batch = job->make_batch(6);
        for (int i = 0; i < steps_before; ++i) job->accumulator->step(batch, job->loss);
        at::manual_seed(8);
        if (job == &probed) {
            const Named before = job->state();
            const std::int64_t live = memory_use().live_bytes;
            EXPECT_TRUE(plan_of(*job, batch).chosen);
            test::expect_same_bits(job->state(), before);
            test::expect_no_gradients(job->parameters);
            EXPECT_EQ(memory_use().live_bytes, live);
            EXPECT_EQ(job->optimizer->has_state(), steps_before > 0);
        }
        // What is left in the optimizer would show here.
        for (int i = 0; i < 3; ++i) job->accumulator->step(batch, job->loss);
    }
    test::expect_same_bits(probed.state(), other.state());
}

TEST_F(ProbeTest, LeavesNoTraceBeforeTheFirstStep) {
    for (const char* optimizer : {"adamw", "sgd"}) {
        expect_no_trace([=] { return test::gpt_job(small_gpt(), {.micro_batch = 2}, optimizer); }, 0);
        expect_no_trace(
            [=] { return test::resnet_job({.classes = 3, .width = 8, .blocks = 1}, {.micro_batch = 2}, optimizer); },
            0);
    }
}

TEST_F(ProbeTest, LeavesNoTraceInTheMiddleOfARun) {
    for (const char* optimizer : {"adamw", "sgd"}) {
        expect_no_trace([=] { return test::gpt_job(small_gpt(), {.micro_batch = 2}, optimizer); }, 2);
        expect_no_trace(
            [=] { return test::resnet_job({.classes = 3, .width = 8, .blocks = 1}, {.micro_batch = 2}, optimizer); },
            2);
    }
}

TEST_F(ProbeTest, LeavesGradientsOfZeroAsTheyAre) {
    Job job = test::gpt_job(small_gpt());
    const Batch batch = job.make_batch(4);
    std::vector<at::Tensor> zeros;
    for (const Parameter& parameter : job.parameters) {
        zeros.push_back(at::zeros_like(parameter.tensor));
        parameter.tensor.mutable_grad() = zeros.back();
    }
    plan_of(job, batch);
    for (std::size_t i = 0; i < zeros.size(); ++i) {
        EXPECT_TRUE(job.parameters[i].tensor.grad().is_same(zeros[i]));
        EXPECT_EQ(zeros[i].count_nonzero().item<std::int64_t>(), 0);
    }
}

TEST_F(ProbeTest, LeavesNoTraceOfATorchOptimizer) {
    Job job = test::gpt_job(small_gpt(0.0));
    std::vector<at::Tensor> tensors;
    for (const Parameter& parameter : job.parameters) tensors.push_back(parameter.tensor);
    torch::optim::AdamW torch_optimizer(tensors, torch::optim::AdamWOptions(1e-3));
    TorchOptimizer optimizer(torch_optimizer);
    Accumulator accumulator(job.parameters, optimizer, {.plan = {.micro_batch = 2}});
    const Batch batch = job.make_batch(4);
    for (int round = 0; round < 2; ++round) {
        const Named before = job.state();
        const std::int64_t live = memory_use().live_bytes;
        const PlanReport report = plan_batch(accumulator, batch, job.loss, {.budget_bytes = 1024 * mebibyte});
        test::expect_same_bits(job.state(), before);
        EXPECT_EQ(memory_use().live_bytes, live);
        EXPECT_EQ(torch_optimizer.state().size(), round == 0 ? 0u : job.parameters.size());
        std::int64_t parameter_bytes = 0;
        for (const at::Tensor& tensor : tensors) parameter_bytes += static_cast<std::int64_t>(tensor.nbytes());
        // Two moments, and a little for its other numbers.
        if (round == 0) {
            EXPECT_NEAR(report.fixed.optimizer_state, 2 * parameter_bytes, parameter_bytes / 10);
        }
        for (std::size_t i = 0; i < tensors.size(); ++i) {
            EXPECT_TRUE(torch_optimizer.param_groups()[0].params()[i].is_same(tensors[i]));
        }
        EXPECT_TRUE(accumulator.step(batch, job.loss).applied);
    }
}

TEST_F(ProbeTest, ALossFunctionThatThrowsLeavesTheJobAsItWas) {
    for (int fail_at = 1; fail_at < 12; ++fail_at) {
        Job job = test::resnet_job({.classes = 3, .width = 8, .blocks = 1});
        const Batch batch = job.make_batch(8);
        const Named before = job.state();
        const std::int64_t live = memory_use().live_bytes;
        int calls = 0;
        const LossFunction loss = [&](const Batch& micro) -> WeightedLoss {
            const WeightedLoss result = job.loss(micro);
            if (++calls == fail_at) throw std::runtime_error("no such label");
            return result;
        };
        EXPECT_THROW(plan_batch(*job.accumulator, batch, loss, {.budget_bytes = 1024 * mebibyte}), std::runtime_error);
        test::expect_same_bits(job.state(), before);
        test::expect_no_gradients(job.parameters);
        EXPECT_EQ(memory_use().live_bytes, live);
        EXPECT_TRUE(job.accumulator->step(batch, job.loss).applied);
    }
}

TEST_F(ProbeTest, ALossOfNanIsPlannedLikeAnyOther) {
    Job job = test::gpt_job(small_gpt());
    const Batch batch = job.make_batch(8);
    const Named before = job.state();
    const LossFunction loss = [&](const Batch& micro) -> WeightedLoss {
        const WeightedLoss result = job.loss(micro);
        return {result.sum * std::numeric_limits<double>::quiet_NaN(), result.weight};
    };
    EXPECT_TRUE(plan_batch(*job.accumulator, batch, loss, {.budget_bytes = 1024 * mebibyte}).chosen);
    test::expect_same_bits(job.state(), before);
    EXPECT_FALSE(job.accumulator->step(batch, loss).applied);
    EXPECT_TRUE(job.accumulator->step(batch, job.loss).applied);
}

TEST_F(ProbeTest, SamplesWithoutTargetsArePlannedLikeOthers) {
    Job job = test::gpt_job(small_gpt()), other = test::gpt_job(small_gpt());
    const Batch batch = job.make_batch(16);
    Batch masked = batch;
    masked.fields[1] = batch.fields[1].clone();
    masked.fields[1].narrow(0, 0, 8).fill_(-100);
    const PlanReport report = plan_of(job, masked, {.micro_batch = 4});
    EXPECT_EQ(report.choice().peak_bytes() - report.fixed.other, [&] {
        const PlanReport plain = plan_of(other, batch, {.micro_batch = 4});
        return plain.choice().peak_bytes() - plain.fixed.other;
    }());
}

TEST_F(ProbeTest, AHeadThatWasAddedInTheMiddleOfARunIsPlannedFor) {
    Job job = test::mlp_job({.inputs = 8, .classes = 4});
    const Batch batch = job.make_batch(8);
    for (int i = 0; i < 2; ++i) job.accumulator->step(batch, job.loss);
    torch::nn::Linear head(4, 4096);
    const Parameters added = parameters_of(head);
    dynamic_cast<AdamW&>(*job.optimizer).add_group({.parameters = added});
    job.accumulator->track(added);
    const LossFunction loss = [&](const Batch& micro) -> WeightedLoss {
        const WeightedLoss before = job.loss(micro);
        return {before.sum + head->forward(at::ones({micro.size(), 4})).square().sum(), before.weight};
    };
    const PlanReport report = plan_batch(*job.accumulator, batch, loss, {.budget_bytes = 1024 * mebibyte});
    job.accumulator->set_plan(report.choice().plan);
    reset_peak_memory();
    for (int i = 0; i < 2; ++i) job.accumulator->step(batch, loss);
    EXPECT_LE(memory_use().peak_bytes, report.choice().peak_bytes());
}

TEST_F(ProbeTest, ParametersThatTheAccumulatorDoesNotKnowKeepTheirGradients) {
    Job job = test::mlp_job({.inputs = 8, .classes = 4});
    const Parameters some(job.parameters.begin(), job.parameters.begin() + 2);
    AdamW optimizer(split_by_decay(some, 0.1));
    Accumulator accumulator(some, optimizer, {.model = job.model.get()});
    EXPECT_TRUE(plan_batch(accumulator, job.make_batch(8), job.loss, {.budget_bytes = 1024 * mebibyte}).chosen);
    test::expect_no_gradients(job.parameters);
}

TEST_F(ProbeTest, ABatchThatIsGatheredIsNotTouched) {
    Job job = test::gpt_job(small_gpt(), {.micro_batch = 2});
    const Batch batch = job.make_batch(4);
    job.accumulator->gather(batch, job.loss);
    test::expect_usage_error({"neither applied nor discarded"}, [&] { plan_of(job, batch); });
    EXPECT_TRUE(job.accumulator->apply().applied);
}

TEST_F(ProbeTest, TheRecomputeOfTheModelIsThePlansAgain) {
    for (const bool recompute : {false, true}) {
        Job job = test::gpt_job(small_gpt(), {.micro_batch = 2, .recompute = recompute});
        plan_of(job, job.make_batch(16));
        EXPECT_EQ(job.accumulator->recomputable()->recomputes(), recompute);
    }
}

// ---- what it costs ----

TEST_F(ProbeTest, AGivenMicroBatchIsRunTwiceAndTheOptimizerIsRehearsedWithItsGradients) {
    Job job = test::gpt_job({.layers = 2, .heads = 2, .width = 256, .length = 128, .vocabulary = 64});
    int calls = 0;
    const LossFunction loss = [&](const Batch& micro) -> WeightedLoss {
        // Long enough that nothing is timed again.
        std::this_thread::sleep_for(std::chrono::milliseconds(30));
        ++calls;
        return job.loss(micro);
    };
    const PlanReport report =
        plan_batch(*job.accumulator, job.make_batch(8), loss, {.budget_bytes = 1024 * mebibyte, .micro_batch = 2});
    EXPECT_EQ(calls, 2);
    EXPECT_GT(report.fixed.optimizer_state, 0);
    EXPECT_GT(report.update_seconds, 0.0);
}

// ---- predicted against measured ----

struct Case {
    const char* name;
    std::function<Job(const std::string&)> make;
    std::vector<std::int64_t> sizes;  // none of which planning tries
    bool recompute;
};

// The smaller version of bench/memory. Bar: 3 %.
TEST_F(ProbeTest, PredictsThePeakOfMicroBatchesThatItHasNotTried) {
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

TEST_F(ProbeTest, ThePeakDoesNotGrowWithTheNumberOfMicroBatches) {
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

TEST_F(ProbeTest, TheBudgetHoldsToTheByte) {
    Job job = test::gpt_job(small_gpt());
    const Batch batch = job.make_batch(16);
    for (const std::int64_t asked : {std::int64_t{3'000'000}, std::int64_t{2'000'000}, std::int64_t{1'300'000}}) {
        Job fresh = test::gpt_job(small_gpt());
        const PlanReport report = plan_of(fresh, batch, {.budget_bytes = asked});
        ASSERT_TRUE(report.chosen) << asked;
        const std::int64_t needed = report.choice().peak_bytes();
        EXPECT_LE(needed, asked);
        {
            const BudgetScope scope(needed);
            EXPECT_EQ(peak_of_two_steps(fresh, batch, report.choice().plan), needed);
            EXPECT_EQ(fresh.accumulator->step(batch, fresh.loss).out_of_memory, 0);
        }
        const BudgetScope scope(needed - 1);
        EXPECT_GT(fresh.accumulator->step(batch, fresh.loss).out_of_memory, 0);
    }
}

TEST_F(ProbeTest, AModelThatAllocatesDifferentlyEveryTimeIsPlannedAllTheSame) {
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

TEST_F(ProbeTest, ABudgetBelowTheParametersIsExplained) {
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
    const std::int64_t elsewhere = memory_use().live_bytes - report.fixed.parameters - report.fixed.other;
    const BudgetScope budget(least->peak_bytes() + elsewhere);
    again.accumulator->set_plan(least->plan);
    for (int i = 0; i < 2; ++i) EXPECT_EQ(again.accumulator->step(batch, again.loss).out_of_memory, 0);
}

TEST_F(ProbeTest, RefusesWhatMeansNothing) {
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

TEST_F(ProbeTest, PlansForTheLongestShapeThatTheDataHolds) {
    const Ragged data;
    Batch longest = longest_batch(data, 4);
    EXPECT_EQ(longest.size(), 4);
    EXPECT_EQ(longest.fields[0].size(1), 16);
    Job job = test::gpt_job(small_gpt());
    const PlanReport report = plan_of(job, longest, {.budget_bytes = 2 * mebibyte});
    longest = {};  // or two batches would be there at once
    const BudgetScope budget(report.choice().peak_bytes());
    job.accumulator->set_plan(report.choice().plan);
    for (std::int64_t i = 0; i + 4 <= data.size(); ++i) {
        const Batch batch = data.get(std::vector<std::int64_t>{i, i + 1, i + 2, i + 3});
        EXPECT_EQ(job.accumulator->step(batch, job.loss).out_of_memory, 0);
    }
}

}  // namespace
}  // namespace microbatch
