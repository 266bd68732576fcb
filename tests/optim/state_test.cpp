// An optimizer goes back to what it was, and goes on from there with the same bits.
#include <ATen/ATen.h>
#include <torch/optim/adagrad.h>
#include <torch/optim/adam.h>
#include <torch/optim/adamw.h>
#include <torch/optim/lbfgs.h>
#include <torch/optim/rmsprop.h>
#include <torch/optim/sgd.h>

#include <functional>
#include <memory>

#include "microbatch/optim/adamw.h"
#include "microbatch/optim/sgd.h"
#include "microbatch/optim/torch_optimizer.h"
#include "support/errors.h"
#include "support/gradients.h"
#include "support/one_thread.h"

namespace microbatch {
namespace {

using namespace test;

/// An optimizer of a kind, on parameters of its own; the last one gets a gradient from the third step on alone.
struct Case {
    Parameters parameters;
    std::unique_ptr<torch::optim::Optimizer> theirs;
    std::unique_ptr<Optimizer> optimizer;

    explicit Case(const std::string& kind) {
        at::manual_seed(1);
        for (const char* name : {"a", "b", "late"}) parameters.push_back({name, at::randn({4, 3}).requires_grad_()});
        std::vector<at::Tensor> tensors;
        for (const Parameter& one : parameters) tensors.push_back(one.tensor);
        const std::vector<ParameterGroup> groups{{.parameters = parameters, .weight_decay = 0.1}};
        if (kind == "AdamW") optimizer = std::make_unique<AdamW>(groups);
        if (kind == "Sgd") optimizer = std::make_unique<Sgd>(groups, SgdOptions{.momentum = 0.9});
        if (kind == "Sgd without momentum") optimizer = std::make_unique<Sgd>(groups);
        if (kind == "torch AdamW") theirs = std::make_unique<torch::optim::AdamW>(tensors);
        if (kind == "torch Adam") theirs = std::make_unique<torch::optim::Adam>(tensors);
        if (kind == "torch RMSprop") {
            theirs = std::make_unique<torch::optim::RMSprop>(tensors, torch::optim::RMSpropOptions(0.01).momentum(0.9));
        }
        if (kind == "torch Adagrad") theirs = std::make_unique<torch::optim::Adagrad>(tensors);
        if (kind == "torch SGD") {
            theirs = std::make_unique<torch::optim::SGD>(tensors, torch::optim::SGDOptions(0.1).momentum(0.9));
        }
        if (theirs) optimizer = std::make_unique<TorchOptimizer>(*theirs);
    }

    void step(int number) {
        at::manual_seed(static_cast<std::uint64_t>(100 + number));
        for (const Parameter& one : parameters) {
            const at::Tensor gradient = at::randn({4, 3});
            if (one.name != "late" || number >= 3) one.tensor.mutable_grad() = gradient;
        }
        optimizer->step(2.0);
        clear_gradients(parameters);
    }

    OptimizerState copy() const {
        OptimizerState state = optimizer->state();
        for (auto& tensors : state) {
            for (at::Tensor& tensor : tensors) tensor = tensor.clone();
        }
        return state;
    }

    void put_back(const Named& values, const OptimizerState& state) const {
        const at::NoGradGuard no_grad;
        for (std::size_t i = 0; i < values.size(); ++i) at::Tensor(parameters[i].tensor).copy_(values[i].tensor);
        optimizer->restore(state);
    }
};

class OptimizerStates : public testing::TestWithParam<const char*> {};

TEST_P(OptimizerStates, GoesOnWithTheSameBitsFromWhereItWas) {
    for (const int from : {0, 1, 2, 5}) {
        Case run(GetParam());
        for (int i = 0; i < from; ++i) run.step(i);
        const Named values = values_of(run.parameters);
        const OptimizerState state = run.copy();
        for (int i = from; i < 8; ++i) run.step(i);
        const Named wanted = values_of(run.parameters);
        for (int again = 0; again < 2; ++again) {
            run.put_back(values, state);
            for (int i = from; i < 8; ++i) run.step(i);
            expect_same_bits(values_of(run.parameters), wanted);
        }
    }
}

TEST_P(OptimizerStates, AnotherOneMadeAlikeGoesOnWithIt) {
    Case run(GetParam()), other(GetParam());
    for (int i = 0; i < 5; ++i) run.step(i);
    other.put_back(values_of(run.parameters), run.copy());
    run.step(5);
    other.step(5);
    expect_same_bits(values_of(other.parameters), values_of(run.parameters));
}

TEST_P(OptimizerStates, TheLearningRateStays) {
    Case run(GetParam());
    for (int i = 0; i < 5; ++i) run.step(i);
    const OptimizerState state = run.copy();
    run.optimizer->set_learning_rate(0.25);
    run.optimizer->restore(state);
    EXPECT_EQ(run.optimizer->learning_rate(), 0.25);
}

INSTANTIATE_TEST_SUITE_P(All, OptimizerStates,
                         testing::Values("AdamW", "Sgd", "Sgd without momentum", "torch AdamW", "torch Adam",
                                         "torch SGD", "torch RMSprop", "torch Adagrad"));

TEST(OptimizerState, OfOtherParametersIsRefusedAndNothingHasChanged) {
    Case run("AdamW");
    for (int i = 0; i < 5; ++i) run.step(i);
    const OptimizerState before = run.copy();
    const auto refused = [&](const std::vector<std::string>& words,
                             const std::function<void(OptimizerState&)>& change) {
        OptimizerState state = before;
        change(state);
        expect_usage_error(words, [&] { run.optimizer->restore(state); });
        const OptimizerState after = run.optimizer->state();
        for (std::size_t i = 0; i < before.size(); ++i) {
            for (std::size_t j = 0; j < before[i].size(); ++j) EXPECT_TRUE(at::equal(after[i][j], before[i][j]));
        }
    };
    refused({"2", "3"}, [](OptimizerState& state) { state.pop_back(); });
    refused({"late", "3", "2"}, [](OptimizerState& state) { state.back().pop_back(); });
    refused({"late", "shape"}, [](OptimizerState& state) { state.back()[0] = at::zeros({3, 4}); });
    refused({"late"}, [](OptimizerState& state) { state.back()[0] = at::zeros({4, 3}, at::kDouble); });
}

TEST(OptimizerState, WhatATorchOptimizerCannotHaveIsRefused) {
    Case run("torch AdamW");
    for (int i = 0; i < 5; ++i) run.step(i);
    const OptimizerState before = run.copy();
    for (const std::size_t i : {0, 1, 2}) {
        OptimizerState state = before;
        state[0][i] = at::empty({0}, at::kByte);  // as one that torch has none of
        expect_usage_error({"torch"}, [&] { run.optimizer->restore(state); });
        state[0][i] = at::zeros({3, 4});
        expect_usage_error({"torch"}, [&] { run.optimizer->restore(state); });
    }
    expect_usage_error({"torch"}, [&] { run.optimizer->restore({{at::zeros({64}, at::kByte)}}); });
    expect_usage_error({"torch"}, [&] { run.optimizer->restore({{}}); });
    expect_usage_error({"torch"}, [&] { run.optimizer->restore({}); });
    const OptimizerState after = run.optimizer->state();
    for (std::size_t i = 0; i < before.size(); ++i) {
        for (std::size_t j = 0; j < before[i].size(); ++j) EXPECT_TRUE(at::equal(after[i][j], before[i][j]));
    }
    // What the optimizer's settings need must be there.
    torch::optim::AdamW largest({run.parameters[0].tensor}, torch::optim::AdamWOptions().amsgrad(true));
    expect_usage_error({"torch"}, [&] { TorchOptimizer(largest).require_state({before[0]}); });
    torch::optim::Adagrad adagrad(std::vector<at::Tensor>{run.parameters[0].tensor});
    expect_usage_error({"torch"}, [&] { TorchOptimizer(adagrad).require_state({{}}); });
    torch::optim::LBFGS unknown({run.parameters[0].tensor});
    expect_usage_error({"AdamW", "Adagrad"}, [&] { TorchOptimizer(unknown).require_state({{}}); });
}

}  // namespace
}  // namespace microbatch
