// Planning on a live job has no side effects.
#include "microbatch/step/probe.h"

#include <ATen/ATen.h>
#include <torch/nn/modules/linear.h>
#include <torch/optim/adamw.h>

#include <chrono>
#include <limits>
#include <stdexcept>
#include <string>
#include <thread>

#include "microbatch/model/recomputable.h"
#include "microbatch/optim/torch_optimizer.h"
#include "support/device_memory.h"
#include "support/errors.h"
#include "support/gradients.h"
#include "support/planning.h"

namespace microbatch {
namespace {

using namespace test;
using NoTrace = Planning;

void expect_no_trace(const std::function<Job()>& make, int steps_before) {
    Job probed = make(), other = make();
    for (Job* job : {&probed, &other}) {
        at::manual_seed(7);
        const Batch batch = job->make_batch(6);
        for (int i = 0; i < steps_before; ++i) job->accumulator->step(batch, job->loss);
        at::manual_seed(8);
        if (job == &probed) {
            const Named before = job->state();
            const std::int64_t live = test::memory_use().live_bytes;
            EXPECT_TRUE(plan_of(*job, batch).chosen);
            test::expect_same_bits(job->state(), before);
            test::expect_no_gradients(job->parameters);
            EXPECT_EQ(test::memory_use().live_bytes, live);
            EXPECT_EQ(job->optimizer->has_state(), steps_before > 0);
        }
        // What is left in the optimizer would show here.
        for (int i = 0; i < 3; ++i) job->accumulator->step(batch, job->loss);
    }
    test::expect_same_bits(probed.state(), other.state());
}

TEST_F(NoTrace, LeavesNoTraceBeforeTheFirstStep) {
    for (const char* optimizer : {"adamw", "sgd"}) {
        expect_no_trace([=] { return test::gpt_job(small_gpt(), {.micro_batch = 2}, optimizer); }, 0);
        expect_no_trace(
            [=] { return test::resnet_job({.classes = 3, .width = 8, .blocks = 1}, {.micro_batch = 2}, optimizer); },
            0);
    }
}

TEST_F(NoTrace, LeavesNoTraceInTheMiddleOfARun) {
    for (const char* optimizer : {"adamw", "sgd"}) {
        expect_no_trace([=] { return test::gpt_job(small_gpt(), {.micro_batch = 2}, optimizer); }, 2);
        expect_no_trace(
            [=] { return test::resnet_job({.classes = 3, .width = 8, .blocks = 1}, {.micro_batch = 2}, optimizer); },
            2);
    }
}

TEST_F(NoTrace, LeavesGradientsOfZeroAsTheyAre) {
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

TEST_F(NoTrace, LeavesNoTraceOfATorchOptimizer) {
    Job job = test::gpt_job(small_gpt(0.0));
    std::vector<at::Tensor> tensors;
    for (const Parameter& parameter : job.parameters) tensors.push_back(parameter.tensor);
    torch::optim::AdamW torch_optimizer(tensors, torch::optim::AdamWOptions(1e-3));
    TorchOptimizer optimizer(torch_optimizer);
    Accumulator accumulator(job.parameters, optimizer, {.plan = {.micro_batch = 2}});
    const Batch batch = job.make_batch(4);
    for (int round = 0; round < 2; ++round) {
        const Named before = job.state();
        const std::int64_t live = test::memory_use().live_bytes;
        const PlanReport report = plan_batch(accumulator, batch, job.loss, {.budget_bytes = 1024 * mebibyte});
        test::expect_same_bits(job.state(), before);
        EXPECT_EQ(test::memory_use().live_bytes, live);
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

TEST_F(NoTrace, ALossFunctionThatThrowsLeavesTheJobUnchanged) {
    for (int fail_at = 1; fail_at < 12; ++fail_at) {
        Job job = test::resnet_job({.classes = 3, .width = 8, .blocks = 1});
        const Batch batch = job.make_batch(8);
        const Named before = job.state();
        const std::int64_t live = test::memory_use().live_bytes;
        int calls = 0;
        const LossFunction loss = [&](const Batch& micro) -> WeightedLoss {
            const WeightedLoss result = job.loss(micro);
            if (++calls == fail_at) throw std::runtime_error("no such label");
            return result;
        };
        // With time for as many trials, however slow the machine.
        const PlannerOptions how{.budget_bytes = 1024 * mebibyte, .least_seconds = 1000.0};
        EXPECT_THROW(plan_batch(*job.accumulator, batch, loss, how), std::runtime_error);
        test::expect_same_bits(job.state(), before);
        test::expect_no_gradients(job.parameters);
        EXPECT_EQ(test::memory_use().live_bytes, live);
        EXPECT_TRUE(job.accumulator->step(batch, job.loss).applied);
    }
}

TEST_F(NoTrace, ALossOfNanIsPlannedLikeAnyOther) {
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

TEST_F(NoTrace, SamplesWithoutTargetsArePlannedLikeOthers) {
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

TEST_F(NoTrace, AHeadThatWasAddedInTheMiddleOfARunIsPlannedFor) {
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
    test::reset_peak_memory();
    for (int i = 0; i < 2; ++i) job.accumulator->step(batch, loss);
    EXPECT_LE(test::memory_use().peak_bytes, report.choice().peak_bytes());
}

TEST_F(NoTrace, ParametersThatTheAccumulatorDoesNotKnowKeepTheirGradients) {
    Job job = test::mlp_job({.inputs = 8, .classes = 4});
    const auto late = job.model->register_module("late", std::make_shared<torch::nn::LinearImpl>(4, 4));
    const at::Tensor left = at::ones_like(late->bias);
    late->bias.mutable_grad() = left;
    const LossFunction loss = [&](const Batch& micro) -> WeightedLoss {
        const WeightedLoss before = job.loss(micro);
        return {before.sum + late->forward(at::ones({micro.size(), 4})).square().sum(), before.weight};
    };
    EXPECT_TRUE(plan_batch(*job.accumulator, job.make_batch(8), loss, {.budget_bytes = 1024 * mebibyte}).chosen);
    test::expect_no_gradients(job.parameters);
    EXPECT_FALSE(late->weight.grad().defined());
    EXPECT_TRUE(late->bias.grad().is_same(left));
    EXPECT_TRUE(at::equal(left, at::ones({4})));
}

TEST_F(NoTrace, ABatchThatIsGatheredIsNotTouched) {
    Job job = test::gpt_job(small_gpt(), {.micro_batch = 2});
    const Batch batch = job.make_batch(4);
    job.accumulator->gather(batch, job.loss);
    test::expect_usage_error({"neither applied nor discarded"}, [&] { plan_of(job, batch); });
    EXPECT_TRUE(job.accumulator->apply().applied);
}

TEST_F(NoTrace, TheRecomputeOfTheModelIsThePlansAgain) {
    for (const bool recompute : {false, true}) {
        Job job = test::gpt_job(small_gpt(), {.micro_batch = 2, .recompute = recompute});
        plan_of(job, job.make_batch(16));
        EXPECT_EQ(dynamic_cast<const Recomputable&>(*job.model).recomputes(), recompute);
    }
}

// ---- what it costs ----

TEST_F(NoTrace, AGivenMicroBatchIsRunTwiceAndTheOptimizerIsDryRunedWithItsGradients) {
    Job job = test::gpt_job({.layers = 2, .heads = 2, .width = 256, .length = 128, .vocabulary = 64});
    int calls = 0;
    const LossFunction loss = [&](const Batch& micro) -> WeightedLoss {
        // On any machine long enough that nothing is timed again.
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

}  // namespace
}  // namespace microbatch
