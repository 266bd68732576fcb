// Which parameters, in which groups, with which settings: names, groups, and what is refused.
#include <ATen/Context.h>
#include <gtest/gtest.h>
#include <torch/nn/modules/linear.h>
#include <torch/optim/sgd.h>

#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "microbatch/model/parameters.h"
#include "microbatch/optim/adamw.h"
#include "microbatch/optim/sgd.h"
#include "microbatch/optim/torch_optimizer.h"
#include "support/errors.h"
#include "support/one_thread.h"

namespace microbatch {
namespace {

using test::expect_usage_error;

constexpr double nan = std::numeric_limits<double>::quiet_NaN();
constexpr double infinity = std::numeric_limits<double>::infinity();

at::Tensor leaf(std::vector<std::int64_t> shape, at::ScalarType dtype = at::kDouble) {
    return at::ones(shape, dtype).requires_grad_();
}

std::vector<std::string> names(const Parameters& parameters) {
    std::vector<std::string> out;
    for (const auto& parameter : parameters) out.push_back(parameter.name);
    return out;
}

double value(const at::Tensor& tensor) {
    return tensor.flatten()[0].item<double>();
}

struct Tied : torch::nn::Module {
    Tied() {
        embedding = register_module("embedding", torch::nn::Linear(torch::nn::LinearOptions(3, 4).bias(false)));
        head = register_module("head", torch::nn::Linear(3, 4));
        head->weight = head->register_parameter("tied", embedding->weight);
        scale = register_parameter("scale", at::ones({1}), /*requires_grad=*/false);
    }
    torch::nn::Linear embedding{nullptr}, head{nullptr};
    at::Tensor scale;
};

TEST(Parameters, OfAModuleAreAllItsTensorsOnceFrozenOnesToo) {
    const Tied model;
    const Parameters found = parameters_of(model);
    EXPECT_EQ(names(found), (std::vector<std::string>{"scale", "embedding.weight", "head.weight", "head.bias"}));
    EXPECT_TRUE(found[0].tensor.is_same(model.scale));
    EXPECT_TRUE(found[1].tensor.is_same(model.embedding->weight));  // head.tied is the same tensor: left out
}

TEST(Parameters, OfAHolderAreThoseOfItsModule) {
    const torch::nn::Linear holder(2, 3);
    EXPECT_EQ(names(parameters_of(holder)), (std::vector<std::string>{"weight", "bias"}));
}

TEST(Parameters, KeepOrderAndFirstNameWhereATensorRepeats) {
    const at::Tensor a = leaf({2}), b = leaf({2}), same_a = a;
    EXPECT_EQ(names(without_repeats({{"b", b}, {"a", a}, {"again", same_a}, {"b", b}})),
              (std::vector<std::string>{"b", "a"}));
    EXPECT_TRUE(without_repeats({}).empty());
}

TEST(SplitByDecay, LeavesBiasesAndNormsWithoutDecay) {
    const Parameters all = {{"norm", leaf({4})},
                            {"linear", leaf({4, 3})},
                            {"bias", leaf({3})},
                            {"scalar", leaf({})},
                            {"conv", leaf({2, 2, 3, 3})}};
    const auto groups = split_by_decay(all, 0.25);
    ASSERT_EQ(groups.size(), 2u);
    for (const auto& group : groups) {
        const bool decays = group.weight_decay != 0.0;
        EXPECT_EQ(names(group.parameters), decays ? (std::vector<std::string>{"linear", "conv"})
                                                  : (std::vector<std::string>{"norm", "bias", "scalar"}));
        EXPECT_EQ(group.weight_decay, decays ? 0.25 : 0.0);
        EXPECT_EQ(group.learning_rate_scale, 1.0);
    }
    EXPECT_NE(groups[0].weight_decay, groups[1].weight_decay);
}

TEST(SplitByDecay, LeavesEmptyGroupsOut) {
    EXPECT_TRUE(split_by_decay({}, 0.1).empty());
    ASSERT_EQ(split_by_decay({{"bias", leaf({3})}}, 0.1).size(), 1u);
    EXPECT_EQ(split_by_decay({{"bias", leaf({3})}}, 0.1)[0].weight_decay, 0.0);
    ASSERT_EQ(split_by_decay({{"weight", leaf({3, 1})}}, 0.1).size(), 1u);
    EXPECT_EQ(split_by_decay({{"weight", leaf({3, 1})}}, 0.1)[0].weight_decay, 0.1);
}

using Maker = std::function<std::unique_ptr<FusedOptimizer>(const std::vector<ParameterGroup>&)>;

class EveryOptimizer : public ::testing::TestWithParam<Maker> {};
INSTANTIATE_TEST_SUITE_P(
    Groups, EveryOptimizer,
    ::testing::Values(
        [](const auto& groups) { return std::make_unique<AdamW>(groups, AdamWOptions{.learning_rate = 0.5}); },
        [](const auto& groups) { return std::make_unique<Sgd>(groups, SgdOptions{.learning_rate = 0.5}); }));

TEST_P(EveryOptimizer, DecaysEachGroupByItsOwnDecayTimesItsOwnRate) {
    const std::vector<at::Tensor> p = {leaf({2}), leaf({2}), leaf({2})};
    const auto optimizer =
        GetParam()({{.parameters = {{"a", p[0]}}, .weight_decay = 0.25},
                    {.parameters = {{"b", p[1]}}},
                    {.parameters = {{"c", p[2]}}, .weight_decay = 0.25, .learning_rate_scale = 0.5}});
    for (const auto& tensor : p) tensor.mutable_grad() = at::zeros({2}, at::kDouble);
    optimizer->step();
    // 1 - rate x decay, exact in binary; a zero gradient moves nothing.
    EXPECT_EQ(value(p[0]), 1 - 0.5 * 0.25);
    EXPECT_EQ(value(p[1]), 1.0);
    EXPECT_EQ(value(p[2]), 1 - 0.25 * 0.25);
}

TEST_P(EveryOptimizer, KeepsTheScaleOfAGroupWhenTheRateChanges) {
    const at::Tensor scaled = leaf({2}), plain = leaf({2});
    const auto ours = GetParam()({{.parameters = {{"p", scaled}}, .weight_decay = 0.1, .learning_rate_scale = 0.25}});
    const auto reference = GetParam()({{.parameters = {{"p", plain}}, .weight_decay = 0.1}});
    EXPECT_EQ(ours->learning_rate(), 0.5);  // of a group whose scale is 1
    for (const double rate : {0.5, 0.0, 0.125, 2.0}) {
        ours->set_learning_rate(rate);
        reference->set_learning_rate(rate * 0.25);
        for (const auto& tensor : {scaled, plain}) tensor.mutable_grad() = at::full({2}, rate + 1, at::kDouble);
        ours->step();
        reference->step();
        EXPECT_EQ(value(scaled), value(plain)) << rate;
    }
    EXPECT_NE(value(scaled), 1.0);
}

TEST_P(EveryOptimizer, AGroupAddedLaterStepsLikeOneThatWasThere) {
    const at::Tensor a = leaf({2}), b = leaf({2}), c = leaf({2});
    const auto ours = GetParam()({{.parameters = {{"a", a}}}});
    const auto reference = GetParam()({{.parameters = {{"c", c}}, .weight_decay = 0.1, .learning_rate_scale = 0.5}});
    a.mutable_grad() = at::ones({2}, at::kDouble);
    ours->step();
    ours->add_group({.parameters = {{"b", b}}, .weight_decay = 0.1, .learning_rate_scale = 0.5});
    for (int step = 0; step < 3; ++step) {
        for (const auto& tensor : {a, b, c}) tensor.mutable_grad() = at::full({2}, step + 1.0, at::kDouble);
        ours->step();
        reference->step();
        EXPECT_EQ(value(b), value(c));
    }
    ASSERT_EQ(ours->parameters().size(), 2u);
    EXPECT_TRUE(ours->parameters()[0].is_same(a) && ours->parameters()[1].is_same(b));
}

TEST_P(EveryOptimizer, ARefusedGroupLeavesNothingBehind) {
    const at::Tensor a = leaf({2}), b = leaf({2});
    const auto optimizer = GetParam()({{.parameters = {{"a", a}}}});
    const at::Tensor whole = at::zeros({2}, at::kLong), sparse = at::ones({2}).to_sparse();
    for (const auto& [bad, part] : std::vector<std::pair<Parameter, std::string>>{{{"twice", a}, "twice"},
                                                                                  {{"whole", whole}, "whole"},
                                                                                  {{"sparse", sparse}, "sparse"},
                                                                                  {{"none", {}}, "none"}}) {
        expect_usage_error({part}, [&] { optimizer->add_group({.parameters = {{"b", b}, bad}}); });
        EXPECT_EQ(optimizer->parameters().size(), 1u) << part;
    }
    optimizer->add_group({.parameters = {{"b", b}}});
    EXPECT_EQ(optimizer->parameters().size(), 2u);
}

TEST_P(EveryOptimizer, RefusesATensorInTwoGroupsAndStepsOneThatRepeatsOnce) {
    const at::Tensor a = leaf({2}), same = a;
    expect_usage_error({"tied"}, [&] { GetParam()({{.parameters = {{"a", a}}}, {.parameters = {{"tied", same}}}}); });
    const auto optimizer = GetParam()({{.parameters = {{"a", a}, {"tied", same}}, .weight_decay = 0.25}});
    EXPECT_EQ(optimizer->parameters().size(), 1u);
    a.mutable_grad() = at::zeros({2}, at::kDouble);
    optimizer->step();
    EXPECT_EQ(value(a), 1 - 0.5 * 0.25);
}

TEST_P(EveryOptimizer, RefusesABadDecayOrScale) {
    for (const auto& [bad, said] : {std::pair{-1.5, "-1.5"}, {nan, "nan"}, {infinity, "inf"}, {-infinity, "-inf"}}) {
        const at::Tensor a = leaf({2});
        expect_usage_error({"weight decay is " + std::string(said)}, [&] {
            GetParam()({{.parameters = {{"a", a}}, .weight_decay = bad}});
        });
        const auto optimizer = GetParam()({});
        expect_usage_error({"learning rate scale is " + std::string(said)}, [&] {
            optimizer->add_group({.parameters = {{"a", a}}, .learning_rate_scale = bad});
        });
        EXPECT_TRUE(optimizer->parameters().empty());
    }
}

TEST_P(EveryOptimizer, RefusesABadRateAndKeepsThePreviousOne) {
    const auto optimizer = GetParam()({});
    for (const auto& [bad, said] : {std::pair{-0.5, "-0.5"}, {nan, "nan"}, {infinity, "inf"}}) {
        expect_usage_error({"learning rate", said}, [&] { optimizer->set_learning_rate(bad); });
        EXPECT_EQ(optimizer->learning_rate(), 0.5);
    }
}

TEST_P(EveryOptimizer, AcceptsAnExpandedGradient) {
    const at::Tensor a = leaf({4, 3}), b = leaf({4, 3});
    const auto optimizer = GetParam()({{.parameters = {{"a", a}, {"b", b}}}});
    a.mutable_grad() = at::full({1}, 2.0, at::kDouble).expand({4, 3});
    b.mutable_grad() = at::full({4, 3}, 2.0, at::kDouble);
    optimizer->step();
    EXPECT_TRUE(at::equal(a, b));
    EXPECT_NE(value(a), 1.0);
}

TEST_P(EveryOptimizer, RefusesASparseGradientByName) {
    const at::Tensor a = leaf({2}), b = leaf({3});
    const auto optimizer = GetParam()({{.parameters = {{"a", a}, {"embedding", b}}}});
    b.mutable_grad() = at::ones({3}, at::kDouble).to_sparse();
    expect_usage_error({"embedding", "sparse"}, [&] { optimizer->step(); });
}

TEST(AdamW, RefusesSettingsOutOfRange) {
    for (const auto& [bad, said] : {std::pair{-0.5, "-0.5"}, {nan, "nan"}, {infinity, "inf"}}) {
        const std::string is = std::string(" is ") + said;
        expect_usage_error({"AdamW", "learning rate" + is}, [&] { AdamW({}, {.learning_rate = bad}); });
        expect_usage_error({"AdamW", "betas", said}, [&] { AdamW({}, {.beta1 = bad}); });
        expect_usage_error({"AdamW", "betas", said}, [&] { AdamW({}, {.beta2 = bad}); });
        expect_usage_error({"AdamW", "epsilon" + is}, [&] { AdamW({}, {.epsilon = bad}); });
    }
    expect_usage_error({"AdamW", "betas are 1 and 0.999"}, [] { AdamW({}, {.beta1 = 1.0}); });
    expect_usage_error({"AdamW", "betas are 0.9 and 1"}, [] { AdamW({}, {.beta2 = 1.0}); });
    EXPECT_NO_THROW(AdamW({}, {.learning_rate = 0, .beta1 = 0, .beta2 = 0, .epsilon = 0}));
}

TEST(Sgd, RefusesSettingsOutOfRange) {
    for (const auto& [bad, said] : {std::pair{-0.5, "-0.5"}, {nan, "nan"}, {infinity, "inf"}}) {
        const std::string is = std::string(" is ") + said;
        expect_usage_error({"Sgd", "learning rate" + is}, [&] { Sgd({}, {.learning_rate = bad}); });
        expect_usage_error({"Sgd", "momentum" + is}, [&] { Sgd({}, {.momentum = bad}); });
    }
    expect_usage_error({"Sgd", "momentum is 1"}, [] { Sgd({}, {.momentum = 1.0}); });
    expect_usage_error({"Sgd", "momentum"}, [] { Sgd({}, {.nesterov = true}); });
    EXPECT_NO_THROW(Sgd({}, {.learning_rate = 0, .momentum = 0.5, .nesterov = true}));
}

double rate_of(torch::optim::Optimizer& optimizer, std::size_t group) {
    return optimizer.param_groups().at(group).options().get_lr();
}

torch::optim::OptimizerParamGroup torch_group(const at::Tensor& tensor, double rate) {
    return {{tensor}, std::make_unique<torch::optim::SGDOptions>(rate)};
}

TEST(TorchOptimizer, StepsAndKeepsTheRatiosOfGroupsThroughZero) {
    const at::Tensor a = leaf({2}), b = leaf({2}), c = leaf({2});
    torch::optim::SGD sgd({torch_group(a, 0.5), torch_group(b, 0.125)}, torch::optim::SGDOptions(0.5));
    TorchOptimizer optimizer(sgd);
    EXPECT_EQ(optimizer.learning_rate(), 0.5);
    for (const double rate : {1.0, 0.0, 0.25}) {
        optimizer.set_learning_rate(rate);
        EXPECT_EQ(optimizer.learning_rate(), rate);
        EXPECT_EQ(rate_of(sgd, 0), rate);
        EXPECT_EQ(rate_of(sgd, 1), rate / 4);
    }
    sgd.add_param_group(torch_group(c, 0.75));
    optimizer.set_learning_rate(0.5);
    EXPECT_EQ(rate_of(sgd, 1), 0.125);
    EXPECT_EQ(rate_of(sgd, 2), 0.5);  // added since: the first group's rate
    ASSERT_EQ(optimizer.parameters().size(), 3u);
    for (const auto& tensor : {a, b, c}) tensor.mutable_grad() = at::ones({2}, at::kDouble);
    optimizer.step();
    EXPECT_EQ(value(a), 0.5);
    EXPECT_EQ(value(b), 0.875);
    EXPECT_EQ(value(c), 0.5);
}

TEST(TorchOptimizer, GivesEveryGroupTheRateWhereTheFirstBeganAtZero) {
    torch::optim::SGD sgd({torch_group(leaf({2}), 0.0), torch_group(leaf({2}), 0.125)}, torch::optim::SGDOptions(0.5));
    TorchOptimizer optimizer(sgd);
    optimizer.set_learning_rate(0.25);
    EXPECT_EQ(rate_of(sgd, 0), 0.25);
    EXPECT_EQ(rate_of(sgd, 1), 0.25);
}

TEST(TorchOptimizer, RefusesBadRatesAndAnOptimizerWithoutGroups) {
    torch::optim::SGD sgd({torch_group(leaf({2}), 0.5)}, torch::optim::SGDOptions(0.5));
    TorchOptimizer optimizer(sgd);
    for (const auto& [bad, said] : {std::pair{-0.5, "-0.5"}, {nan, "nan"}, {infinity, "inf"}}) {
        expect_usage_error({"learning rate", said}, [&] { optimizer.set_learning_rate(bad); });
        EXPECT_EQ(rate_of(sgd, 0), 0.5);
    }
    torch::optim::SGD empty(std::vector<torch::optim::OptimizerParamGroup>{}, torch::optim::SGDOptions(0.5));
    expect_usage_error({"group"}, [&] { TorchOptimizer{empty}; });
}

}  // namespace
}  // namespace microbatch
