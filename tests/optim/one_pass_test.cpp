// The division that the optimizers make on the way: the bits of dividing first, whatever is stepped and on how many
// threads.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>
#include <torch/optim/adamw.h>

#include <functional>
#include <memory>
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
using Groups = std::vector<ParameterGroup>;

const std::vector<std::function<std::unique_ptr<Optimizer>(const Groups&)>> makers = {
    [](const Groups& groups) { return std::make_unique<AdamW>(groups); },
    [](const Groups& groups) { return std::make_unique<Sgd>(groups); },
    [](const Groups& groups) { return std::make_unique<Sgd>(groups, SgdOptions{.momentum = 0.9}); },
    [](const Groups& groups) {
        return std::make_unique<Sgd>(groups,
                                     SgdOptions{.momentum = 0.9, .nesterov = true, .decoupled_weight_decay = false});
    },
};

/// Small ones, odd ones and one that several threads share.
Tensors random_tensors(std::uint64_t seed, at::ScalarType type) {
    at::manual_seed(seed);
    Tensors tensors;
    for (const std::int64_t count : {1, 0, 7, 64, 1001, 100'003, 3}) {
        tensors.push_back(at::randn({count}, at::kDouble).to(type));
    }
    return tensors;
}

Tensors trained(const Tensors& start) {
    Tensors result;
    for (const at::Tensor& tensor : start) result.push_back(tensor.clone().requires_grad_());
    return result;
}

Groups two_groups(const Tensors& tensors) {
    Groups groups = {{.parameters = {}, .weight_decay = 0.1},
                     {.parameters = {}, .weight_decay = 0.0, .learning_rate_scale = 0.5}};
    for (std::size_t i = 0; i < tensors.size(); ++i) groups[i % 2].parameters.push_back({str_cat("p", i), tensors[i]});
    return groups;
}

void give(const Tensors& parameters, const Tensors& gradients) {
    for (std::size_t i = 0; i < parameters.size(); ++i) parameters[i].mutable_grad() = gradients[i].clone();
}

void expect_same_tensors(const Tensors& left, const Tensors& right) {
    for (std::size_t i = 0; i < left.size(); ++i) EXPECT_TRUE(same_bits(left[i].detach(), right[i].detach())) << i;
}

class OnePass : public ::testing::TestWithParam<at::ScalarType> {
protected:
    ~OnePass() override { at::set_num_threads(1); }
};
INSTANTIATE_TEST_SUITE_P(Types, OnePass, ::testing::Values(at::kFloat, at::kDouble, at::kBFloat16));

TEST_P(OnePass, ADivisorGivesTheBitsOfGradientsThatWereDividedFirst) {
    for (const auto& make : makers) {
        for (const double divisor : {1.0, 3.0, 1234.5678, 0.37}) {
            const Tensors start = random_tensors(1, GetParam());
            const Tensors one = trained(start), other = trained(start);
            const auto divides = make(two_groups(one)), plain = make(two_groups(other));
            for (int step = 0; step < 5; ++step) {
                const Tensors gradients = random_tensors(10 + step, GetParam());
                give(one, gradients);
                give(other, gradients);
                for (const at::Tensor& parameter : other) parameter.grad().div_(divisor);
                divides->step(divisor);
                plain->step();
            }
            expect_same_tensors(one, other);
            EXPECT_TRUE(divisor != 1.0 || !same_bits(one[5].detach(), start[5]));
        }
    }
}

TEST_P(OnePass, TheBitsAreTheSameOnOneThreadTwoAndThree) {
    for (const auto& make : makers) {
        const Tensors start = random_tensors(2, GetParam());
        std::vector<Tensors> results;
        for (const int threads : {1, 2, 3}) {
            at::set_num_threads(threads);
            results.push_back(trained(start));
            const auto optimizer = make(two_groups(results.back()));
            for (int step = 0; step < 3; ++step) {
                give(results.back(), random_tensors(20 + step, GetParam()));
                optimizer->step(7.0);
            }
        }
        expect_same_tensors(results[1], results[0]);
        expect_same_tensors(results[2], results[0]);
    }
}

TEST(DividingOptimizer, LeavesTheGradientsUnchanged) {
    for (const auto& make : makers) {
        const Tensors parameters = trained(random_tensors(3, at::kFloat));
        const Tensors gradients = random_tensors(4, at::kFloat);
        const auto optimizer = make(two_groups(parameters));
        give(parameters, gradients);
        optimizer->step(3.0);
        for (std::size_t i = 0; i < parameters.size(); ++i) EXPECT_TRUE(same_bits(parameters[i].grad(), gradients[i]));
    }
}

TEST(DividingOptimizer, HoldsNoGradientBetweenStepsAndALaterStepAllocatesNothing) {
    install_budget_allocator();
    for (const auto& make : makers) {
        const Tensors parameters = trained(random_tensors(5, at::kFloat));
        const auto optimizer = make(two_groups(parameters));
        const auto step = [&] {
            for (const at::Tensor& each : parameters) each.mutable_grad() = at::ones_like(each);
            const std::int64_t allocations = allocation_count();
            optimizer->step(3.0);
            const std::int64_t made = allocation_count() - allocations;
            for (const at::Tensor& each : parameters) each.mutable_grad() = at::Tensor();
            return made;
        };
        step();
        const std::int64_t live = memory_use().live_bytes;
        EXPECT_EQ(step(), 0);
        EXPECT_EQ(memory_use().live_bytes, live);
        for (const at::Tensor& each : parameters) each.mutable_grad() = at::ones_like(each);
        parameters[5].mutable_grad() = at::ones({1}).to_sparse();
        expect_usage_error({"sparse"}, [&] { optimizer->step(3.0); });
        for (const at::Tensor& each : parameters) each.mutable_grad() = at::Tensor();
        EXPECT_EQ(memory_use().live_bytes, live);
    }
}

TEST(DividingOptimizer, FollowsGradientsThatComeAndGoAndGroupsThatAreAdded) {
    for (const auto& make : makers) {
        const Tensors start = random_tensors(6, at::kFloat);
        const Tensors together = trained(start), apart = trained(start);
        const auto one = make({});
        auto& groups = dynamic_cast<FusedOptimizer&>(*one);
        std::vector<std::unique_ptr<Optimizer>> each;
        for (std::size_t i = 0; i < start.size(); ++i) {
            const double decay = 0.1 * static_cast<double>(i);
            each.push_back(make({{.parameters = {{"p", apart[i]}}, .weight_decay = decay}}));
        }
        for (std::size_t step = 0; step < 12; ++step) {
            if (step < start.size()) {
                const double decay = 0.1 * static_cast<double>(step);
                groups.add_group({.parameters = {{str_cat("p", step), together[step]}}, .weight_decay = decay});
            }
            const Tensors gradients = random_tensors(30 + step, at::kFloat);
            for (std::size_t i = 0; i < start.size(); ++i) {
                const bool has = i <= step && (step * 5 + i * 3) % 4 != 0;
                together[i].mutable_grad() = has ? gradients[i].clone() : at::Tensor();
                apart[i].mutable_grad() = has ? gradients[i].clone() : at::Tensor();
            }
            one->step(2.5);
            for (const auto& optimizer : each) optimizer->step(2.5);
            expect_same_tensors(together, apart);
        }
    }
}

TEST(DividingOptimizer, ARefusedGradientLeavesEveryParameterAndStateUnchanged) {
    for (const auto& make : makers) {
        const Tensors start = random_tensors(7, at::kFloat);
        const Tensors refused = trained(start), plain = trained(start);
        const auto optimizer = make(two_groups(refused)), reference = make(two_groups(plain));
        const auto step = [&](std::uint64_t seed) {
            give(refused, random_tensors(seed, at::kFloat));
            give(plain, random_tensors(seed, at::kFloat));
            optimizer->step(3.0);
            reference->step(3.0);
        };
        step(40);
        give(refused, random_tensors(41, at::kFloat));
        refused[6].mutable_grad() = at::ones({3}, at::kDouble);
        expect_usage_error({"p6", "Float", "Double"}, [&] { optimizer->step(3.0); });
        refused[6].mutable_grad() = at::ones({4});
        expect_usage_error({"p6", "[3]", "[4]"}, [&] { optimizer->step(3.0); });
        expect_same_tensors(refused, plain);
        step(42);
        expect_same_tensors(refused, plain);
    }
}

TEST(DividingOptimizer, RefusesAParameterThatHasAnotherShapeThanItsState) {
    const at::Tensor parameter = at::ones({4}).requires_grad_();
    AdamW optimizer({{.parameters = {{"grown", parameter}}}});
    parameter.mutable_grad() = at::ones({4});
    optimizer.step();
    parameter.set_data(at::ones({4000}));
    parameter.mutable_grad() = at::ones({4000});
    expect_usage_error({"grown", "[4000]"}, [&] { optimizer.step(); });
    EXPECT_TRUE(at::equal(parameter, at::ones({4000})));
}

TEST(DividingOptimizer, AGraphThatSavedAParameterNoticesTheStep) {
    for (const auto& make : makers) {
        const at::Tensor parameter = at::ones({4}).requires_grad_();
        const auto optimizer = make({{.parameters = {{"p", parameter}}}});
        const at::Tensor square = parameter.square().sum();
        parameter.mutable_grad() = at::ones({4});
        optimizer->step();
        EXPECT_THROW(square.backward(), c10::Error);
    }
}

TEST(DividingOptimizer, ATorchOptimizerGetsGradientsThatAreDivided) {
    const Tensors start = random_tensors(8, at::kDouble);
    const Tensors one = trained(start), other = trained(start);
    torch::optim::AdamW mine(one), theirs(other);
    TorchOptimizer optimizer(mine);
    for (int step = 0; step < 3; ++step) {
        const Tensors gradients = random_tensors(50 + step, at::kDouble);
        give(one, gradients);
        give(other, gradients);
        one[3].mutable_grad() = at::Tensor();
        other[3].mutable_grad() = at::Tensor();
        for (const at::Tensor& parameter : other) {
            if (parameter.grad().defined()) parameter.grad().div_(1.7);
        }
        optimizer.step(1.7);
        theirs.step();
    }
    expect_same_tensors(one, other);
}

}  // namespace
}  // namespace microbatch
