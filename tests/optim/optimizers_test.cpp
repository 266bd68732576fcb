// Values: what AdamW, Sgd and TorchOptimizer do to parameters, against torch::optim and formulas written by hand.
#include <ATen/Context.h>
#include <gtest/gtest.h>
#include <torch/optim/adamw.h>
#include <torch/optim/sgd.h>

#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "microbatch/core/str_cat.h"
#include "microbatch/memory/budget_allocator.h"
#include "microbatch/optim/adamw.h"
#include "microbatch/optim/sgd.h"
#include "microbatch/optim/torch_optimizer.h"
#include "support/errors.h"
#include "support/gradients.h"
#include "support/one_thread.h"

namespace microbatch {
namespace {

using test::expect_usage_error;
using test::same_bits;
using Tensors = std::vector<at::Tensor>;

constexpr int steps = 50;
const std::vector<std::vector<std::int64_t>> shapes = {{33, 31}, {31}, {3, 2, 5, 4}, {1}, {}, {0}};

Tensors random_tensors(at::ScalarType dtype, std::uint64_t seed) {
    at::manual_seed(seed);
    Tensors tensors;
    for (const auto& shape : shapes) tensors.push_back(at::randn(shape, dtype));
    return tensors;
}

Tensors copies(const Tensors& tensors) {
    Tensors out;
    for (const auto& tensor : tensors) out.push_back(tensor.detach().clone().requires_grad_());
    return out;
}

void set_gradients(Tensors& parameters, const Tensors& gradients) {
    for (std::size_t i = 0; i < parameters.size(); ++i) parameters[i].mutable_grad() = gradients[i].clone();
}

Parameters named(const Tensors& tensors) {
    Parameters parameters;
    for (std::size_t i = 0; i < tensors.size(); ++i) parameters.push_back({str_cat("p", i), tensors[i]});
    return parameters;
}

std::vector<ParameterGroup> group(const Tensors& tensors, double weight_decay = 0.0) {
    return {{.parameters = named(tensors), .weight_decay = weight_decay}};
}

/// Two roundings a step, each half of epsilon at most, of numbers below 8: 8 epsilon a step, and as much again for the
/// rounding of the step itself.
double bound(at::ScalarType dtype) {
    const double epsilon = dtype == at::kFloat ? std::numeric_limits<float>::epsilon() : 2.3e-16;
    return steps * 16 * epsilon;
}

double largest_difference(const at::Tensor& left, const at::Tensor& right) {
    if (left.numel() == 0) return 0.0;
    return (left.detach().to(at::kDouble) - right.detach().to(at::kDouble)).abs().max().item<double>();
}

void expect_close(const Tensors& left, const Tensors& right, double tolerance) {
    for (std::size_t i = 0; i < left.size(); ++i) EXPECT_LE(largest_difference(left[i], right[i]), tolerance) << i;
}

/// 50 steps of both with the same random gradients.
void compare(Optimizer& ours, Tensors& parameters, torch::optim::Optimizer& theirs, Tensors& reference) {
    const at::ScalarType dtype = parameters[0].scalar_type();
    const Tensors start = copies(parameters);
    for (int step = 0; step < steps; ++step) {
        const Tensors gradients = random_tensors(dtype, 100 + step);
        set_gradients(parameters, gradients);
        set_gradients(reference, gradients);
        ours.step();
        theirs.step();
        for (std::size_t i = 0; i < parameters.size(); ++i) EXPECT_TRUE(same_bits(parameters[i].grad(), gradients[i]));
    }
    expect_close(parameters, reference, bound(dtype));
    EXPECT_GT(largest_difference(parameters[0], start[0]), 100 * bound(dtype));  // they did move
}

class EveryDtype : public ::testing::TestWithParam<at::ScalarType> {};
INSTANTIATE_TEST_SUITE_P(Optimizers, EveryDtype, ::testing::Values(at::kFloat, at::kDouble));

struct AdamCase {
    AdamWOptions options;
    double weight_decay;
};

TEST_P(EveryDtype, AdamWIsTorchsAdamW) {
    for (const AdamCase& c : {AdamCase{{}, 0.0}, AdamCase{{.learning_rate = 0.02}, 0.3},
                              AdamCase{{.learning_rate = 0.02, .beta1 = 0.5, .beta2 = 0.6}, 0.1},
                              AdamCase{{.learning_rate = 0.02, .beta1 = 0.0, .beta2 = 0.99}, 0.0},
                              AdamCase{{.learning_rate = 0.02, .epsilon = 0.5}, 0.0}}) {
        const Tensors start = random_tensors(GetParam(), 1);
        Tensors mine = copies(start), theirs = copies(start);
        AdamW ours(group(mine, c.weight_decay), c.options);
        torch::optim::AdamW reference(theirs, torch::optim::AdamWOptions(c.options.learning_rate)
                                                  .betas({c.options.beta1, c.options.beta2})
                                                  .eps(c.options.epsilon)
                                                  .weight_decay(c.weight_decay));
        compare(ours, mine, reference, theirs);
    }
}

TEST_P(EveryDtype, SgdWithCoupledDecayIsTorchsSgd) {
    struct Case {
        double momentum;
        bool nesterov;
        double weight_decay;
    };
    for (const Case& c : {Case{0, false, 0}, Case{0, false, 0.3}, Case{0.9, false, 0}, Case{0.9, true, 0},
                          Case{0.5, false, 0.3}, Case{0.5, true, 0.3}}) {
        const Tensors start = random_tensors(GetParam(), 2);
        Tensors mine = copies(start), theirs = copies(start);
        Sgd ours(
            group(mine, c.weight_decay),
            {.learning_rate = 0.02, .momentum = c.momentum, .nesterov = c.nesterov, .decoupled_weight_decay = false});
        torch::optim::SGD reference(
            theirs,
            torch::optim::SGDOptions(0.02).momentum(c.momentum).nesterov(c.nesterov).weight_decay(c.weight_decay));
        compare(ours, mine, reference, theirs);
    }
}

TEST_P(EveryDtype, SgdWithDecoupledDecayIsItsFormula) {
    constexpr double eta = 0.02, lambda = 0.3;
    for (const auto& [mu, nesterov] : {std::pair{0.0, false}, {0.9, false}, {0.9, true}}) {
        Tensors mine = copies(random_tensors(GetParam(), 3));
        Tensors theta, v;
        for (const auto& tensor : mine) {
            theta.push_back(tensor.detach().to(at::kDouble, false, true));
            v.push_back(at::zeros_like(theta.back()));
        }
        Sgd ours(group(mine, lambda), {.learning_rate = eta, .momentum = mu, .nesterov = nesterov});
        for (int step = 0; step < steps; ++step) {
            const Tensors gradients = random_tensors(GetParam(), 200 + step);
            set_gradients(mine, gradients);
            ours.step();
            for (std::size_t i = 0; i < theta.size(); ++i) {
                const at::Tensor g = gradients[i].to(at::kDouble);
                v[i] = mu * v[i] + g;
                theta[i] = theta[i] * (1 - eta * lambda) - eta * (nesterov ? g + mu * v[i] : v[i]);
            }
        }
        expect_close(mine, theta, bound(GetParam()));
    }
}

using Maker = std::function<std::unique_ptr<FusedOptimizer>(const std::vector<ParameterGroup>&)>;

const std::vector<Maker> makers = {
    [](const auto& groups) { return std::make_unique<AdamW>(groups, AdamWOptions{.learning_rate = 0.01}); },
    [](const auto& groups) { return std::make_unique<Sgd>(groups, SgdOptions{.momentum = 0.9}); },
    [](const auto& groups) { return std::make_unique<Sgd>(groups); },
};

TEST_P(EveryDtype, AParameterWithoutAGradientKeepsValueAndState) {
    for (const Maker& make : makers) {
        Tensors mine = copies(random_tensors(GetParam(), 4));
        Tensors alone = {mine[0].detach().clone().requires_grad_()};
        const at::Tensor frozen = mine[2].detach().clone();
        const auto ours = make(group(mine, 0.5)), reference = make(group(alone, 0.5));
        for (int step = 1; step <= 12; ++step) {
            const Tensors gradients = random_tensors(GetParam(), 300 + step);
            set_gradients(mine, gradients);
            mine[2].mutable_grad().reset();
            // First gradient at step 5, none at 8 and 9: the reference has only ever seen the others.
            const bool has_gradient = step >= 5 && step != 8 && step != 9;
            if (!has_gradient) mine[0].mutable_grad().reset();
            ours->step();
            if (!has_gradient) continue;
            alone[0].mutable_grad() = gradients[0].clone();
            reference->step();
            EXPECT_TRUE(same_bits(mine[0], alone[0])) << "step " << step;
        }
        EXPECT_TRUE(same_bits(mine[2], frozen));
    }
}

TEST(AdamW, CorrectsTheBiasFromTheFirstGradientOfEachParameter) {
    Tensors mine = copies(random_tensors(at::kDouble, 5));
    AdamW ours(group(mine), {.learning_rate = 0.01});
    const at::Tensor before = mine[0].detach().clone();
    for (int step = 1; step <= 5; ++step) {
        set_gradients(mine, random_tensors(at::kDouble, 400 + step));
        if (step < 5) mine[0].mutable_grad().reset();
        ours.step();
    }
    // With corrected moments the first step is eta g / (|g| + eps), by hand; uncorrected it would be 3 times as long.
    const at::Tensor g = mine[0].grad();
    EXPECT_LE(largest_difference(mine[0], before - 0.01 * g / (g.abs() + 1e-8)), 1e-14);
}

TEST(FusedOptimizer, KeepsNoStateForAParameterWithoutAGradient) {
    install_budget_allocator();
    for (std::size_t i = 0; i < 2; ++i) {
        const Tensors mine = {at::zeros({10}).requires_grad_(), at::zeros({1'000'000}).requires_grad_()};
        const auto ours = makers[i](group(mine));
        mine[0].mutable_grad() = at::ones({10});
        const std::int64_t before = memory_use().live_bytes;
        ours->step();
        EXPECT_LT(memory_use().live_bytes - before, 1'000);
        mine[1].mutable_grad() = at::ones({1'000'000});
        const std::int64_t with_gradient = memory_use().live_bytes;
        ours->step();
        const std::int64_t state_tensors = i == 0 ? 2 : 1;
        EXPECT_GE(memory_use().live_bytes - with_gradient, state_tensors * 4'000'000);
        EXPECT_LT(memory_use().live_bytes - with_gradient, state_tensors * 4'000'000 + 1'000);
    }
}

TEST_P(EveryDtype, TheLayoutOfParameterAndGradientChangesNothing) {
    at::manual_seed(6);
    const at::Tensor start = at::randn({4, 6, 5, 3}, GetParam());
    const auto channels_last = at::MemoryFormat::ChannelsLast;
    for (const Maker& make : makers) {
        // Each pair: the layouts of the parameter and of its gradient.
        Tensors mine = {start.clone(),
                        start.clone(),
                        start.contiguous(channels_last),
                        start.contiguous(channels_last),
                        start.permute({3, 1, 0, 2}).contiguous().permute({2, 1, 3, 0}),
                        start.clone()};
        for (auto& tensor : mine) tensor.requires_grad_();
        ASSERT_FALSE(mine[4].is_contiguous());
        const auto ours = make(group(mine, 0.1));
        for (int step = 0; step < 5; ++step) {
            const at::Tensor g = at::randn({4, 6, 5, 3}, GetParam());
            mine[0].mutable_grad() = g;
            mine[1].mutable_grad() = g.permute({3, 2, 1, 0}).contiguous().permute({3, 2, 1, 0});
            mine[2].mutable_grad() = g;
            mine[3].mutable_grad() = g.contiguous(channels_last);
            mine[4].mutable_grad() = g.contiguous(channels_last);
            mine[5].mutable_grad() = at::stack({g, g}, -1).select(-1, 1);  // every second element
            ours->step();
        }
        for (std::size_t i = 1; i < mine.size(); ++i) EXPECT_TRUE(same_bits(mine[0], mine[i])) << i;
    }
}

TEST(FusedOptimizer, StepsParametersOfSeveralDtypesEachInItsOwn) {
    for (const Maker& make : makers) {
        const Tensors single = copies(random_tensors(at::kFloat, 7)), twice = copies(random_tensors(at::kDouble, 8));
        Tensors mixed;
        for (std::size_t i = 0; i < shapes.size(); ++i) mixed.insert(mixed.end(), {single[i], twice[i]});
        Tensors first = copies(single), second = copies(twice);
        const auto together = make(group(mixed, 0.1)), one = make(group(first, 0.1)), other = make(group(second, 0.1));
        for (int step = 0; step < 5; ++step) {
            const Tensors g = random_tensors(at::kFloat, 500 + step), h = random_tensors(at::kDouble, 600 + step);
            set_gradients(first, g);
            set_gradients(second, h);
            for (std::size_t i = 0; i < mixed.size(); ++i) mixed[i].mutable_grad() = i % 2 == 0 ? g[i / 2] : h[i / 2];
            together->step();
            one->step();
            other->step();
        }
        for (std::size_t i = 0; i < mixed.size(); ++i) {
            EXPECT_TRUE(same_bits(mixed[i], i % 2 == 0 ? first[i / 2] : second[i / 2])) << i;
        }
    }
}

TEST_P(EveryDtype, AtLearningRateZeroOnlyTheStateMoves) {
    const Tensors start = random_tensors(GetParam(), 9);
    Tensors mine = copies(start), theirs = copies(start);
    AdamW ours(group(mine, 0.1), {.learning_rate = 0.0});
    torch::optim::AdamW reference(theirs, torch::optim::AdamWOptions(0.0).weight_decay(0.1));
    for (int step = 0; step < 6; ++step) {
        const double rate = step < 3 ? 0.0 : 0.1;
        ours.set_learning_rate(rate);
        EXPECT_EQ(ours.learning_rate(), rate);
        for (auto& item : reference.param_groups()) item.options().set_lr(rate);
        const Tensors gradients = random_tensors(GetParam(), 700 + step);
        set_gradients(mine, gradients);
        set_gradients(theirs, gradients);
        ours.step();
        reference.step();
        EXPECT_EQ(same_bits(mine[0].detach(), start[0]), step < 3);
    }
    expect_close(mine, theirs, bound(GetParam()));
}

TEST(Optimizers, SettingsChangedBetweenStepsAreThoseOfTorch) {
    const Tensors start = random_tensors(at::kDouble, 1), gradients = random_tensors(at::kDouble, 2);
    Tensors ours = copies(start), theirs = copies(start);
    AdamW optimizer(group(ours, 0.1), {.learning_rate = 0.01});
    torch::optim::AdamW reference(theirs, torch::optim::AdamWOptions(0.01).weight_decay(0.1));
    auto& options = static_cast<torch::optim::AdamWOptions&>(reference.param_groups()[0].options());
    for (int step = 0; step < steps; ++step) {
        if (step == 20) {
            optimizer.set_betas(0.8, 0.95);
            options.betas({0.8, 0.95});
        }
        if (step == 30) {
            optimizer.set_group(0, 0.5, 0.2);
            options.lr(0.005).weight_decay(0.2);
        }
        for (Tensors* parameters : {&ours, &theirs}) set_gradients(*parameters, gradients);
        optimizer.step();
        reference.step();
    }
    expect_close(ours, theirs, bound(at::kDouble));
}

TEST(Optimizers, AMomentumChangedBetweenStepsIsThatOfTorch) {
    const Tensors start = random_tensors(at::kDouble, 1), gradients = random_tensors(at::kDouble, 2);
    Tensors ours = copies(start), theirs = copies(start);
    Sgd optimizer(group(ours), {.learning_rate = 0.01, .momentum = 0.9});
    torch::optim::SGD reference(theirs, torch::optim::SGDOptions(0.01).momentum(0.9));
    for (int step = 0; step < steps; ++step) {
        if (step == 20) {
            optimizer.set_momentum(0.5);
            static_cast<torch::optim::SGDOptions&>(reference.param_groups()[0].options()).momentum(0.5);
        }
        for (Tensors* parameters : {&ours, &theirs}) set_gradients(*parameters, gradients);
        optimizer.step();
        reference.step();
    }
    expect_close(ours, theirs, bound(at::kDouble));
}

TEST(Optimizers, ASettingOutOfRangeIsRefusedAndChangesNothing) {
    Tensors tensors = copies(random_tensors(at::kDouble, 1));
    AdamW adamw(group(tensors), {.learning_rate = 0.01});
    Sgd sgd(group(tensors), {.learning_rate = 0.01}), heavy(group(tensors), {.learning_rate = 0.01, .momentum = 0.9});
    const double nan = std::numeric_limits<double>::quiet_NaN();
    for (const double bad : {-0.1, 1.0, nan}) {
        expect_usage_error({"beta"}, [&] { adamw.set_betas(bad, 0.9); });
        expect_usage_error({"momentum"}, [&] { heavy.set_momentum(bad); });
    }
    expect_usage_error({}, [&] { adamw.set_group(0, -1.0, 0.0); });
    expect_usage_error({}, [&] { adamw.set_group(1, 1.0, 0.0); });
    expect_usage_error({"momentum"}, [&] { sgd.set_momentum(0.9); });    // there is no buffer
    expect_usage_error({"momentum"}, [&] { heavy.set_momentum(0.0); });  // there would be none
    EXPECT_EQ(adamw.learning_rate(), 0.01);
}

}  // namespace
}  // namespace microbatch
