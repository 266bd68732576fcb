// The host waits for a device where a step is judged, and nowhere in a micro-batch.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <gtest/gtest.h>
#include <torch/nn/module.h>

#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "fake_device/fake_device.h"
#include "microbatch/memory/meter.h"
#include "microbatch/optim/adamw.h"
#include "microbatch/optim/sgd.h"
#include "microbatch/run/recovery.h"
#include "microbatch/step/accumulator.h"
#include "support/errors.h"
#include "support/gradients.h"

namespace microbatch {
namespace {

constexpr std::int64_t most_reads = 3;

/// Two layers with BatchNorm between them, made on a device.
struct TwoLayers : torch::nn::Module {
    explicit TwoLayers(at::Device device) {
        at::Generator random = at::make_generator<at::CPUGeneratorImpl>(3);
        const auto draw = [&](at::IntArrayRef shape) {
            const auto on_cpu = at::TensorOptions(at::kCPU).dtype(at::kDouble);
            return at::randn(shape, random, on_cpu).to(device).requires_grad_();
        };
        first = register_parameter("first", draw({6, 8}));
        scale = register_parameter("scale", draw({8}));
        shift = register_parameter("shift", draw({8}));
        second = register_parameter("second", draw({8, 3}));
        mean = register_buffer("running_mean", at::zeros({8}, first.options().requires_grad(false)));
        variance = register_buffer("running_var", at::ones_like(mean));
    }

    at::Tensor forward(const at::Tensor& x) const {
        const at::Tensor normed =
            at::batch_norm(x.mm(first), scale, shift, mean, variance, /*training=*/true, 0.1, 1e-5, false);
        return normed.tanh().mm(second);
    }

    /// Weighs the samples by the third field, whose sum stays where it is.
    LossFunction loss() const {
        return [this](const Batch& micro) -> WeightedLoss {
            const at::Tensor squares = (forward(micro.fields[0]) - micro.fields[1]).square().sum(1);
            return {(squares * micro.fields[2]).sum(), micro.fields[2].sum()};
        };
    }

    at::Tensor first, scale, shift, second, mean, variance;
};

Batch batch_of(std::int64_t samples, at::Device device) {
    at::Generator random = at::make_generator<at::CPUGeneratorImpl>(4);
    const auto on_cpu = at::TensorOptions(at::kCPU).dtype(at::kDouble);
    return {{at::randn({samples, 6}, random, on_cpu).to(device), at::randn({samples, 3}, random, on_cpu).to(device),
             at::rand({samples}, random, on_cpu).to(device)}};
}

struct Job {
    explicit Job(at::Device device, const Plan& plan, bool adam = true)
        : net(device), parameters(parameters_of(net)), batch(batch_of(24, device)) {
        const std::vector<ParameterGroup> groups{{.parameters = parameters}};
        if (adam) {
            optimizer = std::make_unique<AdamW>(groups, AdamWOptions{});
        } else {
            optimizer = std::make_unique<Sgd>(groups, SgdOptions{});
        }
        accumulator =
            std::make_unique<Accumulator>(net, *optimizer, AccumulatorOptions{.plan = plan, .clip_norm = 1.0});
    }
    StepReport step(bool noise = false) {
        return accumulator->step(TensorBatch(batch), net.loss(), {.measure_noise = noise});
    }

    TwoLayers net;
    Parameters parameters;
    Batch batch;
    std::unique_ptr<Optimizer> optimizer;
    std::unique_ptr<Accumulator> accumulator;
};

std::int64_t reads_of_a_step(const Plan& plan, bool adam, bool noise = false) {
    Job job(fake::device(), plan, adam);
    job.step(noise);
    fake::reset_counts();
    EXPECT_TRUE(job.step(noise).applied);
    EXPECT_EQ(fake::counts().blocking_uploads, 0);
    return fake::counts().host_reads();
}

TEST(DeviceReads, AreAtMostThreeAStepHoweverManyMicroBatchesThereAre) {
    for (const BatchNorm policy : {BatchNorm::naive, BatchNorm::deferred, BatchNorm::exact}) {
        for (const bool adam : {true, false}) {
            const std::int64_t of_two = reads_of_a_step({.micro_batch = 12, .batch_norm = policy}, adam);
            EXPECT_LE(of_two, most_reads) << to_string(policy);
            EXPECT_EQ(reads_of_a_step({.micro_batch = 3, .batch_norm = policy}, adam), of_two) << to_string(policy);
        }
    }
}

TEST(DeviceReads, AreNoMoreWhereTheNoiseIsMeasured) {
    EXPECT_LE(reads_of_a_step({.micro_batch = 3}, true, /*noise=*/true), most_reads);
}

TEST(DeviceReads, AreNoMoreForGradientsOfZerosThatWereLeft) {
    Job job(fake::device(), {.micro_batch = 6});
    job.step();
    for (const Parameter& one : job.parameters) one.tensor.mutable_grad() = at::zeros_like(one.tensor);
    fake::reset_counts();
    job.step();
    EXPECT_LE(fake::counts().host_reads(), most_reads);
}

TEST(DeviceSteps, AgreeWithThoseOfTheCpu) {
    Job here(at::kCPU, {.micro_batch = 5}), there(fake::device(), {.micro_batch = 5});
    for (int i = 0; i < 4; ++i) {
        const StepReport one = here.step(true), other = there.step(true);
        EXPECT_EQ(one.weight, other.weight);
        EXPECT_EQ(one.loss, other.loss);
        // The order of a sum of squares is another one.
        EXPECT_NEAR(one.gradient_norm, other.gradient_norm, 1e-14 * one.gradient_norm);
        EXPECT_NEAR(one.noise->variance, other.noise->variance, 1e-10 * std::abs(one.noise->variance));
    }
    test::expect_agree(test::values_of(here.parameters), test::values_of(there.parameters), 1e-12);
}

TEST(DeviceWeights, ThatAreNegativeOrNotFiniteAreRefusedWhenTheBatchIsComplete) {
    for (const double bad : {-1.0, std::nan(""), HUGE_VAL}) {
        Job job(fake::device(), {.micro_batch = 8});
        const test::Named before = test::values_of(job.parameters);
        const LossFunction loss = [&](const Batch& micro) -> WeightedLoss {
            const WeightedLoss right = job.net.loss()(micro);
            return {right.sum, at::full({}, bad, at::TensorOptions(fake::device()).dtype(at::kDouble))};
        };
        test::expect_usage_error({"the loss function returned the weight"},
                                 [&] { job.accumulator->step(TensorBatch(job.batch), loss); });
        test::expect_same_bits(test::values_of(job.parameters), before);
        EXPECT_FALSE(job.parameters[0].tensor.grad().defined());
    }
}

TEST(DeviceWeights, OfZeroInAllMicroBatchesRefuseTheStepAndInSomeCountForNothing) {
    Job job(fake::device(), {.micro_batch = 8});
    job.batch.fields[2].zero_();
    const StepReport none = job.step();
    EXPECT_FALSE(none.applied);
    EXPECT_EQ(none.reason, "zero weight");
    job.batch.fields[2].narrow(0, 3, 2).fill_(2.0);
    const StepReport some = job.step();
    EXPECT_TRUE(some.applied);
    EXPECT_EQ(some.weight, 4.0);
}

TEST(DeviceWeights, MayBeMixedWithThoseThatAreKnown) {
    Job job(fake::device(), {.micro_batch = 8});
    int calls = 0;
    const LossFunction loss = [&](const Batch& micro) -> WeightedLoss {
        WeightedLoss one = job.net.loss()(micro);
        if (calls++ % 2 == 0) one.weight = one.weight.value();
        return one;
    };
    Job same(fake::device(), {.micro_batch = 8});
    EXPECT_EQ(job.accumulator->step(TensorBatch(job.batch), loss).weight, same.step().weight);
}

TEST(DeviceRecovery, KeepsItsSnapshotsInTheMemoryOfTheHost) {
    Job job(fake::device(), {.micro_batch = 8});
    job.step();
    Recovery recovery(*job.accumulator, {});
    const std::int64_t before = meter_of(fake::device()).use().live_bytes;
    EXPECT_EQ(recovery.keep(0, SpikeGate({})), "");
    EXPECT_EQ(meter_of(fake::device()).use().live_bytes, before);
    EXPECT_GT(recovery.memory_bytes(), 0);
    const test::Named kept = test::values_of(job.parameters);
    job.step();
    SpikeGate gate({});
    EXPECT_EQ(recovery.roll_back(1, gate), 0);
    test::expect_same_bits(test::values_of(job.parameters), kept);
}

TEST(DeviceLoss, IsOfMicroBatchesThatComeFromTheHost) {
    Job here(fake::device(), {.micro_batch = 5});
    Job host(fake::device(), {.micro_batch = 5});
    host.batch = batch_of(24, at::kCPU);
    const LossFunction loss = on_device(host.net.loss(), fake::device());
    host.accumulator->step(TensorBatch(host.batch), loss);
    fake::reset_counts();
    const StepReport from_host = host.accumulator->step(TensorBatch(host.batch), loss);
    EXPECT_LE(fake::counts().host_reads(), most_reads);
    EXPECT_EQ(fake::counts().blocking_uploads, 0);
    EXPECT_EQ(fake::counts().uploads, 5);
    here.step();
    EXPECT_EQ(from_host.loss, here.step().loss);
}

}  // namespace
}  // namespace microbatch
