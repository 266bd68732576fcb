// What goes wrong inside an exact batch leaves nothing behind, and says what to do.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "microbatch/memory/budget_allocator.h"
#include "microbatch/optim/sgd.h"
#include "microbatch/step/accumulator.h"
#include "support/batch_norm.h"
#include "support/device_memory.h"
#include "support/errors.h"
#include "support/tensors.h"

namespace microbatch {
namespace {

using namespace test;
using torch::nn::BatchNorm1d;
using torch::nn::Module;

std::size_t threads() {
    using Files = std::filesystem::directory_iterator;
    return static_cast<std::size_t>(std::distance(Files("/proc/self/task"), Files()));
}

/// What the model's code does besides: called with the place in the model, 0 to 2, and the batch's inputs.
using Disturb = std::function<void(int place, const at::Tensor& x)>;

/// Two layers with dropout, disturbed before, between and after them.
Build disturbed(const std::shared_ptr<Disturb>& disturb) {
    return [disturb](Module& module) -> Forward {
        auto first = add(module, "first", conv1d(3, 4)), second = add(module, "second", conv1d(4, 4));
        auto a = add(module, "a", BatchNorm1d(4)), b = add(module, "b", BatchNorm1d(4));
        return [=](const at::Tensor& x) mutable {
            (*disturb)(0, x);
            at::Tensor y = at::dropout(at::tanh(a(first(x))), 0.2, true);
            (*disturb)(1, x);
            y = at::dropout(at::tanh(b(second(y))), 0.2, true);
            (*disturb)(2, x);
            return y;
        };
    };
}

/// A model in training, whose step is exact.
struct ExactRun {
    explicit ExactRun(Plan plan = {.micro_batch = 3, .batch_norm = BatchNorm::exact})
        : net(make_net(disturbed(disturb))),
          parameters(parameters_of(*net.module)),
          optimizer(split_by_decay(parameters, 0.0), {.learning_rate = 0.1}),
          accumulator(*net.module, optimizer, {.plan = plan}),
          loss(loss_with(net)) {
        at::manual_seed(9);
    }
    ExactRun(const ExactRun&) = delete;

    /// All that a step may change.
    Named state() const {
        Named all = values_of(parameters);
        for (Parameter& buffer : buffers_of(*net.module)) all.push_back(std::move(buffer));
        all.push_back({"generator", at::globalContext().defaultGenerator(at::kCPU).get_state().clone()});
        return all;
    }

    std::shared_ptr<Disturb> disturb = std::make_shared<Disturb>([](int, const at::Tensor&) {});
    Net net;
    Parameters parameters;
    Sgd optimizer;
    Accumulator accumulator;
    LossFunction loss;
};

Batch signals() {
    return normed_batch({8, 3, 5});
}

/// True for the micro-batch that begins with this sample.
bool begins_with(const at::Tensor& x, std::int64_t sample) {
    return at::equal(x[0], signals().fields[0][sample]);
}

TEST(ExactFailures, OfTheModelPassUnchangedAndLeaveNothing) {
    at::ones({1}).requires_grad_().sum().backward();  // starts the threads of accelerators
    const std::size_t before = threads();
    for (const bool recompute : {false, true}) {
        for (const std::int64_t sample : {0, 3, 6}) {
            for (const int where : {0, 1, 2}) {
                SCOPED_TRACE(::testing::Message() << "sample " << sample << ", place " << where);
                ExactRun run({.micro_batch = 3, .recompute = recompute, .batch_norm = BatchNorm::exact});
                run.accumulator.step(signals(), run.loss);
                const Named state = run.state();
                int calls = 0;
                *run.disturb = [&](int place, const at::Tensor& x) {
                    if (place == where && begins_with(x, sample)) throw std::domain_error("struck");
                    calls += place == 2 ? 1 : 0;
                };
                try {
                    run.accumulator.step(signals(), run.loss);
                    ADD_FAILURE() << "nothing thrown";
                } catch (const std::domain_error& error) {
                    EXPECT_STREQ(error.what(), "struck");
                }
                expect_same_bits(run.state(), state);
                expect_no_gradients(run.parameters);
                EXPECT_EQ(threads(), before);
                *run.disturb = [](int, const at::Tensor&) {};
                EXPECT_TRUE(run.accumulator.step(signals(), run.loss).applied);
            }
        }
    }
}

TEST(ExactFailures, LeaveTheNextStepAsItWouldHaveBeen) {
    ExactRun undisturbed, run;
    at::manual_seed(9);
    undisturbed.accumulator.step(signals(), undisturbed.loss);
    const Named wanted = undisturbed.state();
    at::manual_seed(9);
    *run.disturb = [](int place, const at::Tensor& x) {
        if (place == 1 && begins_with(x, 3)) throw 42;  // of no class
    };
    EXPECT_THROW(run.accumulator.step(signals(), run.loss), int);
    *run.disturb = [](int, const at::Tensor&) {};
    run.accumulator.step(signals(), run.loss);
    expect_same_bits(run.state(), wanted);
}

TEST(ExactFailures, OfTorchItselfPassUnchanged) {
    ExactRun run;
    const Named state = run.state();
    *run.disturb = [](int place, const at::Tensor& x) {
        if (place == 1) x.view({17, 3});
    };
    try {
        run.accumulator.step(signals(), run.loss);
        ADD_FAILURE() << "nothing thrown";
    } catch (const c10::Error& error) {
        EXPECT_NE(std::string(error.what()).find("[17, 3]"), std::string::npos) << error.what();
    }
    expect_same_bits(run.state(), state);
    expect_no_gradients(run.parameters);
}

TEST(ExactFailures, MayBeCaughtByTheModel) {
    ExactRun undisturbed, run;
    at::manual_seed(9);
    undisturbed.accumulator.step(signals(), undisturbed.loss);
    at::manual_seed(9);
    *run.disturb = [](int, const at::Tensor& x) { EXPECT_THROW(x.view({17, 3}), c10::Error); };
    run.accumulator.step(signals(), run.loss);
    expect_same_bits(values_of(run.parameters), values_of(undisturbed.parameters));
}

/// A model that runs only one of two norms, or none, as `choose` says of its inputs.
Build choosing(const std::function<int(const at::Tensor&)>& choose) {
    return [choose](Module& module) -> Forward {
        auto first = add(module, "first", conv1d(3, 4));
        auto stem = add(module, "stem", BatchNorm1d(4)), left = add(module, "left", BatchNorm1d(4)),
             right = add(module, "right", BatchNorm1d(4));
        return [=](const at::Tensor& x) mutable {
            const at::Tensor y = at::tanh(stem(first(x)));
            const int chosen = choose(x);
            return chosen == 0 ? y : at::sin(chosen == 1 ? left(y) : right(y));
        };
    };
}

void expect_refused(const std::function<int(const at::Tensor&)>& choose, const std::vector<std::string>& words) {
    at::ones({1}).requires_grad_().sum().backward();  // starts the threads of accelerators
    const std::size_t before = threads();
    for (const bool recompute : {false, true}) {
        const Net net = make_net(choosing(choose));
        const Parameters parameters = parameters_of(*net.module);
        Sgd optimizer(split_by_decay(parameters, 0.0), {.learning_rate = 0.1});
        Accumulator accumulator(*net.module, optimizer,
                                {.plan = {.micro_batch = 3, .recompute = recompute, .batch_norm = BatchNorm::exact}});
        const Named buffers = buffers_of(*net.module);
        expect_usage_error(words, [&] { accumulator.step(signals(), loss_with(net)); });
        expect_same_bits(buffers_of(*net.module), buffers);
        expect_no_gradients(parameters);
        EXPECT_EQ(threads(), before);
    }
}

TEST(ExactFailures, SayWhichLayerAMicroBatchLeavesOut) {
    expect_refused([](const at::Tensor& x) { return begins_with(x, 3) ? 0 : 1; }, {"left", "the end", "deferred"});
    expect_refused([](const at::Tensor& x) { return begins_with(x, 0) ? 0 : 1; }, {"left", "the end", "deferred"});
    expect_refused([](const at::Tensor& x) { return begins_with(x, 6) ? 1 : 0; }, {"left", "the end", "deferred"});
}

TEST(ExactFailures, SayWhichLayersMicroBatchesDifferIn) {
    expect_refused([](const at::Tensor& x) { return begins_with(x, 3) ? 2 : 1; }, {"left", "right", "deferred"});
}

TEST(ExactFailures, AreNotWhatIsChosenForAllAlike) {
    expect_exact(choosing([](const at::Tensor&) { return 2; }), signals(), {3, 8});
}

/// Without torch's own check of the number of values.
Build unchecked() {
    return [](Module& module) -> Forward {
        auto norm = add(module, "norm", BatchNorm1d(3));
        return [=](const at::Tensor& x) mutable {
            return at::batch_norm(x, norm->weight, norm->bias, norm->running_mean, norm->running_var, true, 0.1, 1e-5,
                                  false);
        };
    };
}

TEST(ExactFailures, AreNotMicroBatchesOfOneValue) {
    expect_exact(unchecked(), normed_batch({4, 3}), {1, 2, 3, 4});
}

TEST(ExactFailures, SayThatAnEmptyBatchCannotBeNormalised) {
    const Net net = make_net(unchecked());
    const LossFunction loss = [&](const Batch& batch) -> WeightedLoss {
        return {net.forward(batch.fields[0].narrow(0, 0, 0)).sum(), 1.0};
    };
    const Batch batch{{at::ones({2, 3}, at::kDouble)}};
    EXPECT_ANY_THROW(left_by(net, batch, {.micro_batch = 1, .batch_norm = BatchNorm::exact}, loss));
    expect_no_gradients(parameters_of(*net.module));
}

/// The loss weighs every sample.
WeightedLoss weighted_waves(const at::Tensor& y, const Batch& batch) {
    const at::Tensor& weights = batch.fields[2];
    return {(at::sin(y.flatten(1) + 0.3).sum(1) * weights).sum(), weights.sum().item<double>()};
}

Batch weighted(const std::vector<double>& weights) {
    Batch batch = signals();
    batch.fields.push_back(test::tensor_of(at::ArrayRef<double>(weights), at::kDouble));
    return batch;
}

Build plain() {
    return [](Module& module) -> Forward {
        auto first = add(module, "first", conv1d(3, 4)), second = add(module, "second", conv1d(4, 4));
        auto a = add(module, "a", BatchNorm1d(4)), b = add(module, "b", BatchNorm1d(4));
        return [=](const at::Tensor& x) mutable { return at::tanh(b(second(at::sin(a(first(x)))))); };
    };
}

TEST(ExactWeights, OfZeroLeaveTheSamplesInTheStatistics) {
    expect_exact(plain(), weighted({1, 2, 0, 0, 0, 0, 0.5, 3}), {2, 3, 4, 8}, weighted_waves);
    expect_exact(plain(), weighted({0, 0, 0, 0, 1, 0, 0, 0}), {2, 3, 4, 8}, weighted_waves);
}

TEST(ExactWeights, OfZeroAlwaysMoveTheStatisticsAndGiveNoGradient) {
    const Net native = make_net(plain());
    native.forward(signals().fields[0]);
    for (const bool recompute : {false, true}) {
        const Net net = make_net(plain());
        const Left left = left_by(net, weighted(std::vector<double>(8, 0.0)),
                                  {.micro_batch = 3, .recompute = recompute, .batch_norm = BatchNorm::exact},
                                  loss_with(net, weighted_waves));
        EXPECT_EQ(left.weight, 0.0);
        for (const Parameter& one : left.gradients) EXPECT_FALSE(one.tensor.defined()) << one.name;
        const Named wanted = buffers_of(*native.module);
        for (std::size_t i = 0; i < wanted.size(); ++i) {
            EXPECT_LE(relative_difference(left.buffers[i].tensor, wanted[i].tensor), 1e-12) << wanted[i].name;
        }
    }
}

TEST(ExactWeights, OfZeroExcuseALossThatIsNotANumber) {
    const OutputsLoss loss = [](const at::Tensor& y, const Batch& batch) -> WeightedLoss {
        const WeightedLoss all = weighted_waves(y, batch);
        return {!all.weight.is_known_zero() ? all.sum : all.sum / 0.0 * 0.0, all.weight};
    };
    const Net net = make_net(plain());
    const Left left = left_by(net, weighted({1, 2, 3, 0, 0, 0, 1, 1}),
                              {.micro_batch = 3, .batch_norm = BatchNorm::exact}, loss_with(net, loss));
    EXPECT_TRUE(std::isfinite(left.loss));
    for (const Parameter& one : left.gradients) EXPECT_TRUE(at::isfinite(one.tensor).all().item<bool>()) << one.name;
}

/// A step of large signals, which can run out of memory.
struct LargeRun : ExactRun {
    using ExactRun::ExactRun;
    Batch batch = normed_batch({8, 3, 200});
};

TEST(ExactOutOfMemory, LeavesNothingWhateverTheBudget) {
    install_budget_allocator();
    LargeRun run;
    at::ones({1}).requires_grad_().sum().backward();  // starts the threads of accelerators
    const std::size_t before = threads();
    int failures = 0;
    {
        LargeRun warm;
        warm.accumulator.step(warm.batch, warm.loss);
    }
    for (;; ++failures) {
        const Named state = run.state();
        const std::int64_t live = test::memory_use().live_bytes;
        bool failed = false;
        try {
            const test::BudgetScope budget(live + 10'000 + 5'000 * std::int64_t{failures});
            EXPECT_TRUE(run.accumulator.step(run.batch, run.loss).applied);
        } catch (const Error& error) {
            EXPECT_EQ(error.kind(), ErrorKind::does_not_fit) << error.what();
            failed = true;
        }
        if (!failed) break;
        EXPECT_EQ(test::memory_use().live_bytes, live);
        expect_same_bits(run.state(), state);
        expect_no_gradients(run.parameters);
        EXPECT_EQ(threads(), before);
        ASSERT_LT(failures, 500);
    }
    EXPECT_GT(failures, 5);
}

/// The step, the first time with the n-th allocation refused.
std::pair<StepReport, Named> step_without(std::int64_t n, Plan plan) {
    LargeRun run(plan);
    at::manual_seed(9);
    if (n > 0) test::fail_allocation(n);
    StepReport report = run.accumulator.step(run.batch, run.loss);
    test::fail_allocation(0);
    return {std::move(report), run.state()};
}

TEST(ExactOutOfMemory, AnywhereGivesTheBitsOfTheSmallerPlan) {
    install_budget_allocator();
    for (const bool recompute : {false, true}) {
        const Plan plan{.micro_batch = 3, .recompute = recompute, .batch_norm = BatchNorm::exact};
        std::int64_t count = 0;
        {
            LargeRun run(plan);
            const std::int64_t before = test::allocation_count();
            run.accumulator.step(run.batch, run.loss);
            count = test::allocation_count() - before;
        }
        const std::vector<std::pair<StepReport, Named>> smaller{
            step_without(0, {.micro_batch = 3, .recompute = true, .batch_norm = BatchNorm::exact}),
            step_without(0, {.micro_batch = 1, .recompute = true, .batch_norm = BatchNorm::exact})};
        const Named same = step_without(0, plan).second;
        int recovered = 0;
        for (std::int64_t n = 1; n <= count; n += 7) {
            SCOPED_TRACE(::testing::Message() << "allocation " << n << " of " << count);
            const auto [report, state] = step_without(n, plan);
            EXPECT_TRUE(report.applied);
            const bool gathering = report.plan != plan;
            recovered += gathering ? 1 : 0;
            EXPECT_LE(report.out_of_memory, 1);
            expect_same_bits(state, gathering ? (recompute ? smaller[1] : smaller[0]).second : same);
        }
        EXPECT_GT(recovered, 20);
    }
}

}  // namespace
}  // namespace microbatch
