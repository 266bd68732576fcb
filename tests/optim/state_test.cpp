// An optimizer that is loaded from its saved state continues with the same bits.
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
#include "support/states.h"

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

    StateDict copy() const {
        StateDict state = state_of(*optimizer);
        state.own();
        return state;
    }

    void restore(const Named& values, const StateDict& state) const {
        const at::NoGradGuard no_grad;
        for (std::size_t i = 0; i < values.size(); ++i) at::Tensor(parameters[i].tensor).copy_(values[i].tensor);
        load(*optimizer, StateReader(state));
    }
};

class OptimizerStates : public testing::TestWithParam<const char*> {};

TEST_P(OptimizerStates, ContinueWithTheSameBitsFromWhereTheyWere) {
    for (const int from : {0, 1, 2, 5}) {
        Case run(GetParam());
        for (int i = 0; i < from; ++i) run.step(i);
        const Named values = values_of(run.parameters);
        const StateDict state = run.copy();
        for (int i = from; i < 8; ++i) run.step(i);
        const Named wanted = values_of(run.parameters);
        for (int again = 0; again < 2; ++again) {
            run.restore(values, state);
            for (int i = from; i < 8; ++i) run.step(i);
            expect_same_bits(values_of(run.parameters), wanted);
        }
    }
}

TEST_P(OptimizerStates, ContinueInAnotherOptimizerOfTheSameConfiguration) {
    Case run(GetParam()), other(GetParam());
    for (int i = 0; i < 5; ++i) run.step(i);
    other.restore(values_of(run.parameters), run.copy());
    run.step(5);
    other.step(5);
    expect_same_bits(values_of(other.parameters), values_of(run.parameters));
}

TEST_P(OptimizerStates, LeaveTheLearningRateAlone) {
    Case run(GetParam());
    for (int i = 0; i < 5; ++i) run.step(i);
    const StateDict state = run.copy();
    run.optimizer->set_learning_rate(0.25);
    load(*run.optimizer, StateReader(state));
    EXPECT_EQ(run.optimizer->learning_rate(), 0.25);
}

INSTANTIATE_TEST_SUITE_P(All, OptimizerStates,
                         testing::Values("AdamW", "Sgd", "Sgd without momentum", "torch AdamW", "torch Adam",
                                         "torch SGD", "torch RMSprop", "torch Adagrad"));

TEST(OptimizerState, OfOtherParametersIsRefusedAndNothingChanges) {
    Case run("AdamW");
    for (int i = 0; i < 5; ++i) run.step(i);
    const StateDict before = run.copy();
    const auto refused = [&](const std::vector<std::string>& words, const StateDict& state) {
        expect_error(ErrorKind::bad_data, words, [&] { run.optimizer->prepare(StateReader(state)); });
        expect_same(state_of(*run.optimizer), before);
    };
    refused({"10", "9"}, with(before, "other/0", at::zeros({4, 3})));
    refused({"late/1", "missing"}, without(before, "late/1"));
    refused({"late", "shape"}, with(before, "late/0", at::zeros({3, 4})));
    refused({"late"}, with(before, "late/0", at::zeros({4, 3}, at::kDouble)));
    refused({"late"}, with(before, "late/0", at::zeros({3, 4}).t()));  // laid out in another way
}

TEST(OptimizerState, OfParametersWithoutAGradientIsEmpty) {
    Case run("AdamW"), other("AdamW");
    EXPECT_TRUE(run.copy().tensors().empty());
    run.step(0);
    EXPECT_FALSE(run.copy().has("late/"));
    for (int i = 0; i < 5; ++i) other.step(i);
    load(*other.optimizer, StateReader(run.copy()));
    expect_same(state_of(*other.optimizer), run.copy());
}

TEST(OptimizerState, OfATorchOptimizerThatDoesNotMatchIsRefused) {
    Case run("torch AdamW");
    for (int i = 0; i < 5; ++i) run.step(i);
    const StateDict before = run.copy();
    const auto refused = [&](const std::vector<std::string>& words, const StateDict& state) {
        expect_error(ErrorKind::bad_data, words, [&] { run.optimizer->prepare(StateReader(state)); });
        expect_same(state_of(*run.optimizer), before);
    };
    for (const char* name : {"0/exp_avg", "0/exp_avg_sq"}) {
        refused({name, "missing"}, without(before, name));
        refused({name, "shape"}, with(before, name, at::zeros({3, 4})));
        refused({name, "dtype"}, with(before, name, at::zeros({4, 3}, at::kDouble)));
    }
    refused({"0/max_exp_avg_sq", "shape"}, with(before, "0/max_exp_avg_sq", at::zeros({3, 4})));
    refused({"0/", "does not have"}, with(before, "0/momentum_buffer", at::zeros({4, 3})));
    refused({"torch"}, with(before, "3/exp_avg", at::zeros({4, 3})));
    refused({"0/step", "missing"}, without(before, "0/step"));
    refused({"0/step", "-1"}, with(before, "0/step", StateScalar(std::int64_t{-1})));
    // What the optimizer's settings need must be there.
    StateDict first = StateReader(before).section("0").copy();
    first.move("", "0/");
    torch::optim::AdamW largest({run.parameters[0].tensor}, torch::optim::AdamWOptions().amsgrad(true));
    expect_error(ErrorKind::bad_data, {"0/max_exp_avg_sq"},
                 [&] { TorchOptimizer(largest).prepare(StateReader(first)); });
    torch::optim::Adagrad adagrad(std::vector<at::Tensor>{run.parameters[0].tensor});
    expect_error(ErrorKind::bad_data, {"0/step"}, [&] { TorchOptimizer(adagrad).prepare(StateReader(StateDict())); });
    torch::optim::LBFGS unknown({run.parameters[0].tensor});
    expect_usage_error({"AdamW", "Adagrad"}, [&] { TorchOptimizer(unknown).prepare(StateReader(StateDict())); });
}

}  // namespace
}  // namespace microbatch
