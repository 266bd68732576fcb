// Cases in which autograd must compute the gradient itself.
#include <ATen/autocast_mode.h>
#include <ATen/functorch/DynamicLayer.h>
#include <ATen/functorch/TensorWrapper.h>
#include <torch/csrc/autograd/anomaly_mode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function_hook.h>

#include <cmath>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "autograd/in_place.h"
#include "support/tensors.h"

namespace microbatch {
namespace {

using namespace test;
using torch::autograd::variable_list;

/// The gradients that three backward passes of some kind leave behind, with a scope and without, compared.
template <class Pass>
void expect_as_autograd(Pass&& pass, double tolerance = 1e-6) {
    const auto run = [&](bool on) {
        const at::Tensor weight = weight_with_gradient();
        const at::Tensor x = leaf({4, side});
        Named results;
        for (int i = 0; i < 3; ++i) {
            with_scope(on, [&] {
                for (const at::Tensor& each : pass(x, weight)) results.push_back({"result", each.detach().clone()});
            });
        }
        results.push_back({"weight", weight.grad()});
        results.push_back({"x", x.grad()});
        return results;
    };
    // Sums of 4 products for the weight and of 256 for x, in another order: a few roundings of 6e-8, by their root.
    expect_agree(run(true), run(false), tolerance);
}

TEST_F(InPlace, FallsBackForTheGradientOfAGradient) {
    // The penalty's own sums are of 1024 numbers.
    expect_as_autograd(
        [](const at::Tensor& x, const at::Tensor& weight) {
            const at::Tensor y = at::linear(x, weight, weight[0]).mm(weight).tanh().sum();
            variable_list first = torch::autograd::grad({y}, {x, weight}, {}, {}, /*create_graph=*/true);
            (first[0].square().sum() + first[1].square().sum()).backward();
            return first;
        },
        1e-5);
    expect_as_autograd(
        [](const at::Tensor& x, const at::Tensor& weight) -> variable_list {
            const at::Tensor before = weight.grad().detach(), copy = before.clone();
            at::linear(x, weight).square().sum().backward({}, {}, /*create_graph=*/true);
            EXPECT_TRUE(same_bits(before, copy));  // another tensor is the gradient now
            EXPECT_TRUE(weight.grad().requires_grad());
            const at::Tensor second = torch::autograd::grad({weight.grad().square().sum()}, {x})[0];
            weight.mutable_grad() = before;
            return {second};
        },
        1e-5);
    expect_as_autograd([](const at::Tensor& x, const at::Tensor& weight) -> variable_list {
        const at::Tensor rows = at::embedding(weight, test::tensor_of({1, 2, 2}, at::kLong));
        const at::Tensor first = torch::autograd::grad({rows.pow(3).sum()}, {weight}, {}, {}, true)[0];
        (first * x[0]).sum().backward();
        return {first};
    });
}

TEST_F(InPlace, FallsBackForChosenInputs) {
    expect_as_autograd([](const at::Tensor& x, const at::Tensor& weight) -> variable_list {
        const at::Tensor before = weight.grad().clone();
        variable_list found = torch::autograd::grad({at::linear(x, weight).sum()}, {weight, x});
        EXPECT_TRUE(same_bits(weight.grad(), before));
        torch::autograd::backward({at::linear(x, weight).sum()}, {}, {}, false, {x});
        EXPECT_TRUE(same_bits(weight.grad(), before));
        torch::autograd::backward({at::linear(x, weight).sum()}, {}, {}, false, {weight});
        return found;
    });
}

TEST_F(InPlace, FallsBackForAHookOnTheWeight) {
    int calls = 0;
    const auto twice = [&](const at::Tensor& gradient) {
        ++calls;
        return gradient * 2;
    };
    expect_as_autograd([&](const at::Tensor& x, const at::Tensor& weight) -> variable_list {
        calls = 0;
        const unsigned hook = weight.register_hook(twice);
        at::linear(x, weight).mm(weight).sum().backward();
        EXPECT_EQ(calls, 1);
        weight.remove_hook(hook);
        return {};
    });
    for (const bool early : {true, false}) {
        expect_as_autograd([&](const at::Tensor& x, const at::Tensor& weight) -> variable_list {
            calls = 0;
            const at::Tensor transposed = weight.t();
            if (early) transposed.register_hook(twice);
            const at::Tensor y = x.mm(transposed);
            if (!early) transposed.register_hook(twice);
            y.sum().backward();
            EXPECT_EQ(calls, 1);
            return {};
        });
    }
    expect_as_autograd([](const at::Tensor& x, const at::Tensor& weight) -> variable_list {
        const at::Tensor transposed = weight.t();
        transposed.retain_grad();
        x.mm(transposed).sum().backward();
        return {transposed.grad()};
    });
}

struct CountPost : torch::autograd::FunctionPostHook {
    explicit CountPost(std::vector<bool>& into) : seen(into) {}
    variable_list operator()(const variable_list& outputs, const variable_list& inputs) override {
        seen.push_back(inputs[0].defined());
        return outputs;
    }
    std::vector<bool>& seen;
};

TEST_F(InPlace, FallsBackForAHookOnTheAccumulation) {
    const at::Tensor weight = weight_with_gradient();
    std::vector<bool> gradients;
    const auto accumulate = torch::autograd::impl::grad_accumulator(weight);
    accumulate->add_post_hook(std::make_unique<CountPost>(gradients));
    EXPECT_FALSE(sums_in_place([&] { return at::linear(at::ones({4, side}), weight); }));
    EXPECT_EQ(gradients, std::vector<bool>{true});
}

struct CountAccumulated : torch::autograd::PostAccumulateGradHook {
    explicit CountAccumulated(std::vector<at::Tensor>& into) : seen(into) {}
    void operator()(const at::Tensor& parameter) override { seen.push_back(parameter.grad().clone()); }
    std::vector<at::Tensor>& seen;
};

TEST_F(InPlace, CallsAHookAfterAccumulationOnceWithTheWholeGradient) {
    const auto train = [](bool on, bool table) {
        const at::Tensor weight = weight_with_gradient();
        std::vector<at::Tensor> seen;
        torch::autograd::impl::set_post_acc_grad_hooks(weight, std::make_unique<CountAccumulated>(seen));
        for (int pass = 1; pass <= 3; ++pass) {
            with_scope(on, [&] {
                const at::Tensor x = at::embedding(weight.detach(), test::tensor_of({1, 2}, at::kLong));
                const at::Tensor rows = table ? at::embedding(weight, test::tensor_of({3, 2}, at::kLong)) : x;
                at::linear(at::linear(rows, weight), weight).sum().backward();
            });
            EXPECT_EQ(seen.size(), static_cast<std::size_t>(pass)) << on;
            EXPECT_TRUE(same_bits(seen.back(), weight.grad())) << on;
        }
        return Named{{"weight", weight.grad()}};
    };
    for (const bool table : {false, true}) expect_agree(train(true, table), train(false, table), 1e-6);
}

struct DropGradient : torch::autograd::PostAccumulateGradHook {
    void operator()(const at::Tensor& parameter) override { parameter.mutable_grad() = at::Tensor(); }
};

TEST_F(InPlace, SumsInPlaceUnderAHookAfterAccumulationWhichMayTakeTheGradient) {
    const at::Tensor weight = weight_with_gradient();
    torch::autograd::impl::set_post_acc_grad_hooks(weight, std::make_unique<DropGradient>());
    const auto forward = [&] { return at::linear(at::ones({4, side}), weight); };
    EXPECT_TRUE(sums_in_place(forward));
    EXPECT_FALSE(weight.grad().defined());
    EXPECT_FALSE(sums_in_place(forward));  // there is nothing to add to
    EXPECT_FALSE(weight.grad().defined());
}

TEST_F(InPlace, FallsBackForAGradientOfAnotherKind) {
    const at::Tensor x = at::randn({4, side});
    const at::Tensor sparse = weight_with_gradient();
    sparse.mutable_grad() = at::randn({side, side}).to_sparse();
    const at::Tensor dense = sparse.grad().to_dense();
    with_scope(true, [&] { at::linear(x, sparse).sum().backward(); });
    EXPECT_LT(relative_difference(sparse.grad(), dense + at::ones({side, 4}).mm(x)), 1e-6);

    const at::Tensor low = at::ones({side, side}, at::kBFloat16).requires_grad_();
    low.set_grad_dtype(at::kFloat);
    for (int pass = 0; pass < 2; ++pass) {
        with_scope(true, [&] { at::linear(at::ones({4, side}, at::kBFloat16), low).sum().backward(); });
    }
    EXPECT_EQ(low.grad().scalar_type(), at::kFloat);
    EXPECT_TRUE(at::equal(low.grad(), at::full({side, side}, 8.0F)));

    // An expanded number cannot be added to: torch reports an error, and so do we.
    const at::Tensor expanded = weight_with_gradient();
    for (const bool on : {false, true}) {
        expanded.mutable_grad() = at::zeros({1, side}).expand({side, side});
        EXPECT_THROW(with_scope(on, [&] { at::linear(x, expanded).sum().backward(); }), c10::Error) << on;
    }
}

TEST_F(InPlace, FallsBackWhereTheGradientIsAlsoAFactor) {
    expect_as_autograd([](const at::Tensor&, const at::Tensor& weight) -> variable_list {
        const at::Tensor y = at::linear(at::ones({side, side}), weight);
        y.backward(weight.grad());
        return {};
    });
}

TEST_F(InPlace, FallsBackForDetectionOfAnomalies) {
    const at::Tensor weight = weight_with_gradient(), x = at::full({4, side}, NAN);
    const torch::autograd::DetectAnomalyGuard detect;
    const at::Tensor y = with_scope(true, [&] { return at::linear(x, weight); });
    EXPECT_THROW(y.backward(at::ones_like(y)), std::exception);  // a NaN in the weight's gradient
}

TEST_F(InPlace, FallsBackForAutocast) {
    // Rounded to bfloat16 in the same places: only sums of 4 differ.
    expect_as_autograd([](const at::Tensor& x, const at::Tensor& weight) -> variable_list {
        at::autocast::set_autocast_enabled(at::kCPU, true);
        at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
        const at::Tensor y = at::linear(x, weight).mm(weight);
        at::autocast::clear_cache();
        at::autocast::set_autocast_enabled(at::kCPU, false);
        EXPECT_EQ(y.scalar_type(), at::kBFloat16);
        y.sum().backward();
        return {};
    });
}

TEST_F(InPlace, FallsBackForForwardDifferentiation) {
    expect_as_autograd([](const at::Tensor& x, const at::Tensor& weight) -> variable_list {
        const std::uint64_t level = torch::autograd::forward_ad::enter_dual_level();
        const at::Tensor dual = at::_make_dual(x, at::ones_like(x), static_cast<std::int64_t>(level));
        const at::Tensor y = at::linear(dual, weight);
        const at::Tensor tangent = y._fw_grad(level).clone();
        torch::autograd::forward_ad::exit_dual_level(level);
        EXPECT_TRUE(tangent.defined());
        return {tangent};
    });
}

TEST_F(InPlace, FallsBackUnderFunctorch) {
    const at::Tensor weight = weight_with_gradient().detach(), x = at::ones({4, side});
    // In a thread of its own: functorch stays with the thread that used it.
    std::thread([&] {
        const InPlaceGradients scope;
        using namespace at::functorch;
        const std::int64_t level =
            initAndPushDynamicLayer(TransformType::Grad, std::nullopt, std::nullopt, /*prev_grad_mode=*/true);
        at::Tensor gradient;
        {
            const at::Tensor wrapped = makeTensorWrapper(weight, level).requires_grad_();
            const at::Tensor y = at::linear(x, wrapped).sum();  // a C++ Function throws here
            gradient = unwrapIfDead(torch::autograd::grad({y}, {wrapped})[0]);
        }
        popDynamicLayerAndDeleteMetadata();
        EXPECT_TRUE(at::equal(unwrapIfDead(gradient), at::full({side, side}, 4.0F)));
    }).join();
}

TEST_F(InPlace, FallsBackForSparseGradients) {
    const at::Tensor weight = leaf({11, 6});
    for (int pass = 0; pass < 2; ++pass) {
        with_scope(true, [&] {
            at::embedding(weight, test::tensor_of({1, 1}, at::kLong), -1, false, /*sparse=*/true).sum().backward();
        });
    }
    EXPECT_TRUE(weight.grad().is_sparse());
    EXPECT_EQ(weight.grad().to_dense()[1][0].item<float>(), 4);
}

TEST_F(InPlace, FallsBackForComplexNumbers) {
    const auto gradient = [](bool on) {
        at::manual_seed(1);
        const at::Tensor weight = leaf({5, 3}, at::kComplexDouble);
        const at::Tensor x = at::randn({4, 5}, at::kComplexDouble);
        for (int pass = 0; pass < 2; ++pass) with_scope(on, [&] { at::real(x.mm(weight)).sum().backward(); });
        return weight.grad();
    };
    EXPECT_TRUE(same_bits(gradient(true), gradient(false)));
}

TEST_F(InPlace, LeavesFrozenWeightsAlone) {
    const at::Tensor weight = weight_with_gradient(), x = leaf({4, side});
    const at::Tensor before = weight.grad().clone();
    weight.set_requires_grad(false);
    with_scope(true, [&] { at::linear(x, weight).sum().backward(); });
    weight.set_requires_grad(true);
    // Torch looks when it would add, too.
    const at::Tensor y = with_scope(true, [&] { return at::linear(x, weight).sum(); });
    weight.set_requires_grad(false);
    y.backward();
    EXPECT_TRUE(same_bits(weight.grad(), before));
    EXPECT_TRUE(x.grad().defined());
}

TEST_F(InPlace, NoticesAWeightOrAnInputChangedInPlace) {
    for (const bool on : {false, true}) {
        for (const bool of_weight : {false, true}) {
            const at::Tensor weight = weight_with_gradient(), x = leaf({4, side}) * 1;
            const at::Tensor y = with_scope(on, [&] { return at::linear(x, weight).sum(); });
            {
                const at::NoGradGuard no_grad;
                (of_weight ? weight : x).add_(1);
            }
            EXPECT_THROW(y.backward(), c10::Error);
        }
    }
}

}  // namespace
}  // namespace microbatch
