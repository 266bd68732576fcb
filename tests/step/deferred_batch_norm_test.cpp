// BatchNorm that is deferred: the running statistics move once a step, by the whole batch's; and frozen: they do not.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/nn/modules/container/sequential.h>

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "microbatch/models/resnet.h"
#include "microbatch/optim/sgd.h"
#include "microbatch/step/accumulator.h"
#include "support/batch_norm.h"
#include "support/errors.h"
#include "support/training.h"

namespace microbatch {
namespace {

using namespace test;
using torch::nn::BatchNorm1d;
using torch::nn::BatchNorm1dOptions;
using torch::nn::Module;

/// What arrived at each call of each layer, micro-batch by micro-batch.
using Arrived = std::map<std::string, std::vector<at::Tensor>>;

/// Two layers, the second of which runs twice, with whatever momentum.
Build recorded(const std::shared_ptr<Arrived>& seen, std::optional<double> momentum = 0.1) {
    return [seen, momentum](Module& module) -> Forward {
        auto first = add(module, "first", conv1d(3, 4)), second = add(module, "second", conv1d(4, 4));
        auto a = add(module, "a", BatchNorm1d(BatchNorm1dOptions(4).momentum(momentum)));
        auto b = add(module, "b", BatchNorm1d(BatchNorm1dOptions(4).momentum(momentum)));
        const auto see = [seen](const std::string& call, const at::Tensor& x) {
            (*seen)[call].push_back(x.detach().clone());
            return x;
        };
        return [=](const at::Tensor& x) mutable {
            const at::Tensor y = at::tanh(a(see("a", first(x))));
            const at::Tensor z = at::tanh(b(see("b", second(y))));
            return b(see("b again", second(z)));
        };
    };
}

/// What moving a layer's statistics by these activations at once leaves, in fp64.
void expect_moved(const Named& before, const Named& after, const std::string& layer,
                  const std::vector<std::vector<at::Tensor>>& calls, double momentum, double bar) {
    const auto find = [](const Named& all, const std::string& name) {
        for (const Parameter& one : all) {
            if (one.name == name) return one.tensor;
        }
        ADD_FAILURE() << "no " << name;
        return at::Tensor();
    };
    at::Tensor mean = find(before, layer + ".running_mean").to(at::kDouble);
    at::Tensor variance = find(before, layer + ".running_var").to(at::kDouble);
    for (const std::vector<at::Tensor>& activations : calls) {
        const at::Tensor all = at::cat(activations, 0).to(at::kDouble).transpose(0, 1).flatten(1);
        mean = mean * (1.0 - momentum) + momentum * all.mean(1);
        variance = variance * (1.0 - momentum) + momentum * all.var(1, /*unbiased=*/true);
    }
    EXPECT_LE(relative_difference(find(after, layer + ".running_mean"), mean), bar) << layer;
    EXPECT_LE(relative_difference(find(after, layer + ".running_var"), variance), bar) << layer;
    const auto counted = find(after, layer + ".num_batches_tracked") - find(before, layer + ".num_batches_tracked");
    EXPECT_EQ(counted.item<std::int64_t>(), static_cast<std::int64_t>(calls.size())) << layer;
}

Batch signals(at::ScalarType type = at::kDouble, std::int64_t samples = 8) {
    return normed_batch({samples, 3, 5}, type);
}

TEST(DeferredBatchNorm, MovesTheStatisticsByThoseOfTheBatch) {
    for (const auto& [type, bar] : {std::pair{at::kDouble, 1e-13}, {at::kFloat, 1e-6}}) {
        for (const std::int64_t micro_batch : {1, 2, 3, 5, 7, 8, 20}) {
            SCOPED_TRACE(micro_batch);
            const auto seen = std::make_shared<Arrived>();
            const Net net = make_net(recorded(seen), type);
            const Named before = buffers_of(*net.module);
            const Left left = left_by(net, signals(type),
                                      {.micro_batch = micro_batch, .batch_norm = BatchNorm::deferred}, loss_with(net));
            expect_moved(before, left.buffers, "a", {(*seen)["a"]}, 0.1, bar);
            expect_moved(before, left.buffers, "b", {(*seen)["b"], (*seen)["b again"]}, 0.1, bar);
        }
    }
}

TEST(DeferredBatchNorm, WeighsUnequalMicroBatchesByTheirCount) {
    const auto seen = std::make_shared<Arrived>();
    const Net net = make_net(recorded(seen));
    const Named before = buffers_of(*net.module);
    Batch batch = signals();
    batch.fields[0].narrow(0, 7, 1).add_(100.0);
    const Left left = left_by(net, batch, {.micro_batch = 6, .batch_norm = BatchNorm::deferred}, loss_with(net));
    EXPECT_NE((*seen)["a"][0].size(0), (*seen)["a"][1].size(0));
    expect_moved(before, left.buffers, "a", {(*seen)["a"]}, 0.1, 1e-12);
}

TEST(DeferredBatchNorm, KeepsItsDigitsWhereTheMeanIsLarge) {
    const auto seen = std::make_shared<Arrived>();
    const Net net = make_net(recorded(seen));
    const at::NoGradGuard no_grad;
    net.module->named_parameters()["first.bias"].fill_(1e6);
    const Named before = buffers_of(*net.module);
    const at::AutoGradMode grad(true);
    const Left left = left_by(net, signals(), {.micro_batch = 3, .batch_norm = BatchNorm::deferred}, loss_with(net));
    // The variance is of order 1: a sum of squares would lose 12 digits.
    expect_moved(before, left.buffers, "a", {(*seen)["a"]}, 0.1, 1e-9);
}

TEST(DeferredBatchNorm, TakesAnyMomentum) {
    for (const double momentum : {0.0, 0.3, 1.0}) {
        const auto seen = std::make_shared<Arrived>();
        const Net net = make_net(recorded(seen, momentum));
        const Named before = buffers_of(*net.module);
        const Left left =
            left_by(net, signals(), {.micro_batch = 3, .batch_norm = BatchNorm::deferred}, loss_with(net));
        expect_moved(before, left.buffers, "a", {(*seen)["a"]}, momentum, 1e-12);
        expect_moved(before, left.buffers, "b", {(*seen)["b"], (*seen)["b again"]}, momentum, 1e-12);
    }
}

TEST(DeferredBatchNorm, AveragesOverStepsWithoutAMomentum) {
    const auto seen = std::make_shared<Arrived>();
    const Net net = make_net(recorded(seen, std::nullopt));
    for (int step = 0; step < 3; ++step) {
        seen->clear();
        const Named before = buffers_of(*net.module);
        const Left left =
            left_by(net, signals(), {.micro_batch = 3, .batch_norm = BatchNorm::deferred}, loss_with(net));
        expect_moved(before, left.buffers, "a", {(*seen)["a"]}, 1.0 / (step + 1), 1e-12);
    }
}

TEST(DeferredBatchNorm, NormalisesByTheMicroBatch) {
    const auto seen = std::make_shared<Arrived>();
    const Net naive = make_net(recorded(seen)), deferred = make_net(recorded(seen));
    const Left wanted = left_by(naive, signals(), {.micro_batch = 3}, loss_with(naive));
    const Left found =
        left_by(deferred, signals(), {.micro_batch = 3, .batch_norm = BatchNorm::deferred}, loss_with(deferred));
    expect_same_bits(found.gradients, wanted.gradients);
    EXPECT_EQ(found.loss, wanted.loss);
}

TEST(DeferredBatchNorm, OfABatchAtOnceIsTorchs) {
    const auto seen = std::make_shared<Arrived>();
    const Net native = make_net(recorded(seen)), deferred = make_net(recorded(seen));
    const Left wanted = left_at_once(native, signals(), loss_with(native));
    expect_left(
        left_by(deferred, signals(), {.micro_batch = 8, .batch_norm = BatchNorm::deferred}, loss_with(deferred)),
        wanted, 1e-13);
}

TEST(DeferredBatchNorm, LeavesLayersInEvaluationAlone) {
    const auto seen = std::make_shared<Arrived>();
    for (const BatchNorm policy : {BatchNorm::deferred, BatchNorm::frozen}) {
        const Net net = make_net(recorded(seen));
        net.module->eval();
        const Named before = buffers_of(*net.module);
        const Left left = left_by(net, signals(), {.micro_batch = 3, .batch_norm = policy}, loss_with(net));
        expect_same_bits(left.buffers, before);
    }
}

TEST(DeferredBatchNorm, CountsAMicroBatchOfWeightZero) {
    const auto seen = std::make_shared<Arrived>();
    const Net net = make_net(recorded(seen));
    const Named before = buffers_of(*net.module);
    const OutputsLoss loss = [](const at::Tensor& y, const Batch& batch) -> WeightedLoss {
        return {y.sum(), batch.size() == 2 ? 0.0 : 1.0};
    };
    const Left left =
        left_by(net, signals(), {.micro_batch = 3, .batch_norm = BatchNorm::deferred}, loss_with(net, loss));
    expect_moved(before, left.buffers, "a", {(*seen)["a"]}, 0.1, 1e-12);
}

TEST(FrozenBatchNorm, MovesNothingAndNormalisesByTheRunningStatistics) {
    for (const std::int64_t micro_batch : {1, 3, 8}) {
        const auto seen = std::make_shared<Arrived>();
        const Net net = make_net(recorded(seen)), evaluated = make_net(recorded(seen));
        for (const Net* one : {&net, &evaluated}) one->forward(signals(at::kDouble, 9).fields[0]);
        const Named before = buffers_of(*net.module);
        const Left left =
            left_by(net, signals(), {.micro_batch = micro_batch, .batch_norm = BatchNorm::frozen}, loss_with(net));
        expect_same_bits(left.buffers, before);
        evaluated.module->eval();
        expect_left(left, left_at_once(evaluated, signals(), loss_with(evaluated)), 1e-12);
    }
}

/// Of a step: what it leaves in a ResNet's buffers.
Named buffers_after_step(Plan plan, int steps = 2) {
    Job job = resnet_job({.classes = 3, .width = 8, .blocks = 1, .norm = ImageNorm::batch}, plan, "sgd");
    at::manual_seed(4);
    const Batch batch = job.make_batch(7);
    for (int i = 0; i < steps; ++i) job.accumulator->step(batch, job.loss);
    return buffers_of(*job.model);
}

TEST(DeferredBatchNorm, CountsOnceWithRecompute) {
    expect_same_bits(buffers_after_step({.micro_batch = 3, .recompute = true, .batch_norm = BatchNorm::deferred}),
                     buffers_after_step({.micro_batch = 3, .batch_norm = BatchNorm::deferred}));
    for (const bool recompute : {false, true}) {
        for (const Parameter& one :
             buffers_after_step({.micro_batch = 2, .recompute = recompute, .batch_norm = BatchNorm::deferred}, 3)) {
            if (one.name.ends_with("num_batches_tracked")) {
                EXPECT_EQ(one.tensor.item<std::int64_t>(), 3) << one.name;
            }
        }
    }
}

TEST(FrozenBatchNorm, MovesNothingWithRecompute) {
    for (const bool recompute : {false, true}) {
        expect_same_bits(
            buffers_after_step({.micro_batch = 3, .recompute = recompute, .batch_norm = BatchNorm::frozen}, 2),
            buffers_after_step({}, 0));
    }
}

/// A batch that is left after some micro-batches, and resumed here or elsewhere.
TEST(DeferredBatchNorm, OfAnInterruptedBatchMovesAsOfOneThatWasNot) {
    for (const BatchNorm policy : {BatchNorm::deferred, BatchNorm::frozen}) {
        for (const char* model : {"resnet", "norm"}) {
            for (const bool elsewhere : {false, true}) {
                const auto countdown = std::make_shared<int>(0);
                TrainingOptions how{
                    .model = model, .optimizer = "sgd", .plan = {.micro_batch = 3, .batch_norm = policy}};
                how.trainer.stop = [countdown] { return *countdown > 0 && --*countdown == 0; };
                Training undisturbed(how);
                auto run = std::make_unique<Training>(how);
                for (int step = 0; step < 3; ++step) {
                    undisturbed.step();
                    for (int left = 0; left < 2; ++left) {  // of three micro-batches
                        *countdown = 1;
                        ASSERT_TRUE(run->step().paused);
                        if (elsewhere) run = Training::from(how, run->taken_apart());
                    }
                    *countdown = 0;
                    EXPECT_TRUE(run->step().step.applied);
                    expect_same_bits(run->state(), undisturbed.state());
                }
            }
        }
    }
}

TEST(DeferredBatchNorm, OfABatchThatIsResumedInAnotherAccumulatorIsWhole) {
    const auto seen = std::make_shared<Arrived>();
    const Plan plan{.micro_batch = 2, .batch_norm = BatchNorm::deferred};
    const Net net = make_net(recorded(seen));
    const Named before = buffers_of(*net.module);
    Sgd optimizer(split_by_decay(parameters_of(*net.module), 0.0), {.learning_rate = 0.0});
    Accumulator first(*net.module, optimizer, {.plan = plan}), second(*net.module, optimizer, {.plan = plan});
    auto partial =
        std::get<PartialBatch>(first.gather(TensorBatch(signals()), loss_with(net), {.stop = [] { return true; }}));
    EXPECT_EQ((*seen)["a"].size(), 1U);
    for (const Parameter& one : buffers_of(*net.module)) {
        if (one.name.ends_with("running_mean") || one.name.ends_with("running_var")) {
            const auto same = [&](const Parameter& other) {
                return other.name == one.name && same_bits(other.tensor, one.tensor);
            };
            EXPECT_TRUE(std::any_of(before.begin(), before.end(), same)) << one.name;
        }
    }
    StepOptions resume;
    resume.partial = std::move(partial);
    second.step(TensorBatch(signals()), loss_with(net), std::move(resume));
    EXPECT_EQ((*seen)["a"].size(), 4U);
    expect_moved(before, buffers_of(*net.module), "a", {(*seen)["a"]}, 0.1, 1e-12);
    expect_moved(before, buffers_of(*net.module), "b", {(*seen)["b"], (*seen)["b again"]}, 0.1, 1e-12);
}

TEST(DeferredBatchNorm, TakesAStream) {
    for (const BatchNorm policy : {BatchNorm::deferred, BatchNorm::frozen}) {
        const auto seen = std::make_shared<Arrived>();
        const Net net = make_net(recorded(seen));
        const Named before = buffers_of(*net.module);
        Sgd optimizer(split_by_decay(parameters_of(*net.module), 0.0), {.learning_rate = 0.0});
        Accumulator accumulator(*net.module, optimizer, {.plan = {.batch_norm = policy}});
        const Batch batch = signals();
        accumulator.begin();
        for (const auto& [begin, count] : {std::pair{0, 3}, {3, 1}, {4, 4}}) {
            const Batch micro{{batch.fields[0].narrow(0, begin, count), batch.fields[1].narrow(0, begin, count)}};
            accumulator.add(loss_with(net)(micro));
        }
        accumulator.finish();
        accumulator.apply();
        const Named after = buffers_of(*net.module);
        if (policy == BatchNorm::frozen) {
            expect_same_bits(after, before);
        } else {
            expect_moved(before, after, "a", {(*seen)["a"]}, 0.1, 1e-12);
            expect_moved(before, after, "b", {(*seen)["b"], (*seen)["b again"]}, 0.1, 1e-12);
        }
    }
}

TEST(DeferredBatchNorm, IsPutBackByADiscard) {
    for (const BatchNorm policy : {BatchNorm::naive, BatchNorm::deferred, BatchNorm::frozen, BatchNorm::exact}) {
        const Net net = make_net(recorded(std::make_shared<Arrived>()));
        const Named before = buffers_of(*net.module);
        Sgd optimizer(split_by_decay(parameters_of(*net.module), 0.0), {.learning_rate = 0.1});
        Accumulator accumulator(*net.module, optimizer, {.plan = {.micro_batch = 3, .batch_norm = policy}});
        accumulator.gather(signals(), loss_with(net));
        accumulator.discard("unwanted");
        expect_same_bits(buffers_of(*net.module), before);
        EXPECT_TRUE(accumulator.step(signals(), loss_with(net)).applied);
    }
}

TEST(DeferredBatchNorm, IsPutBackByAFailure) {
    for (const BatchNorm policy : {BatchNorm::deferred, BatchNorm::frozen}) {
        const Net net = make_net(recorded(std::make_shared<Arrived>()));
        const Named before = buffers_of(*net.module);
        Sgd optimizer(split_by_decay(parameters_of(*net.module), 0.0), {.learning_rate = 0.1});
        Accumulator accumulator(*net.module, optimizer, {.plan = {.micro_batch = 3, .batch_norm = policy}});
        int calls = 0;
        const LossFunction failing = [&](const Batch& batch) {
            WeightedLoss loss = loss_with(net)(batch);
            if (++calls == 2) throw std::domain_error("struck");
            return loss;
        };
        EXPECT_THROW(accumulator.step(signals(), failing), std::domain_error);
        expect_same_bits(buffers_of(*net.module), before);
        // And the layers are torch's again.
        const Net native = make_net(recorded(std::make_shared<Arrived>()));
        net.forward(signals().fields[0]);
        native.forward(signals().fields[0]);
        expect_same_bits(buffers_of(*net.module), buffers_of(*native.module));
    }
}

TEST(DeferredBatchNorm, OfTwoModelsAtTheSameTimeIsNotMixed) {
    const auto one_seen = std::make_shared<Arrived>(), other_seen = std::make_shared<Arrived>();
    const Net one = make_net(recorded(one_seen)), other = make_net(recorded(other_seen, 0.5));
    const Named one_before = buffers_of(*one.module), other_before = buffers_of(*other.module);
    Gatherer first(*one.module), second(*other.module);
    first.begin(false, {.batch_norm = BatchNorm::deferred});
    second.begin(false, {.batch_norm = BatchNorm::deferred});
    for (int i = 0; i < 2; ++i) {
        first.add(loss_with(one)(signals()));
        second.add(loss_with(other)(signals(at::kDouble, 5)));
    }
    first.finish();
    second.finish();
    expect_moved(one_before, buffers_of(*one.module), "a", {(*one_seen)["a"]}, 0.1, 1e-12);
    expect_moved(other_before, buffers_of(*other.module), "a", {(*other_seen)["a"]}, 0.5, 1e-12);
    first.clear();
    second.clear();
}

TEST(DeferredBatchNorm, RefusesTwoBatchesOfOneModelAtTheSameTime) {
    const Net net = make_net(recorded(std::make_shared<Arrived>()));
    Gatherer first(*net.module), second(*net.module);
    first.begin(false, {.batch_norm = BatchNorm::deferred});
    expect_usage_error({"BatchNorm", "two batches"}, [&] { second.begin(false, {.batch_norm = BatchNorm::deferred}); });
    first.add(loss_with(net)(signals()));
    first.finish();
    first.clear();
    second.begin(false, {.batch_norm = BatchNorm::deferred});
    second.clear();
}

}  // namespace
}  // namespace microbatch
