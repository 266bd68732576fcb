// RMS norm in one operation against torch's operators in double.
#include "microbatch/ops/rms_norm.h"

#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "support/errors.h"
#include "support/gradients.h"
#include "support/one_thread.h"

namespace {

using namespace microbatch;
using test::expect_usage_error;
using test::relative_difference;
using test::same_bits;

constexpr double epsilon = 1e-3;

struct Inputs {
    at::Tensor x, scale;

    explicit Inputs(at::IntArrayRef shape)
        : x(at::randn(shape).requires_grad_()), scale((at::randn({shape.back()}) * 0.3 + 1).requires_grad_()) {}

    Inputs to(at::ScalarType type) const {
        Inputs result = *this;
        for (at::Tensor* one : {&result.x, &result.scale}) *one = one->detach().to(type).requires_grad_();
        return result;
    }

    at::Tensor operator()() const { return rms_norm(x, scale, epsilon); }
    at::Tensor by_operators() const { return rms_norm_by_operators(x, scale, epsilon); }
    std::vector<at::Tensor> all() const { return {x, scale}; }
};

/// What is differentiated: no direction of the result is special.
at::Tensor scalar_of(const at::Tensor& out) {
    return (out * at::arange(out.numel(), out.options()).view(out.sizes()).sin()).sum();
}

bool is_fast(const at::Tensor& out) {
    return out.grad_fn()->name().find("FusedRmsNorm") != std::string::npos;
}

// Sums of up to 600 numbers about 1 in fp32: 6e-8 times the root of their number.
constexpr double tolerance = 2e-6;

TEST(RmsNorm, HasTheValueAndBothGradientsOfTorchsOperatorsInDouble) {
    at::manual_seed(1);
    for (const std::vector<std::int64_t>& shape :
         {std::vector<std::int64_t>{5}, {1, 1}, {3, 4, 5}, {2, 70, 36}, {600, 128}, {2, 1, 3, 17}}) {
        const Inputs inputs(shape), exact = inputs.to(at::kDouble);
        const at::Tensor out = inputs(), expected = exact.by_operators();
        ASSERT_TRUE(is_fast(out));
        EXPECT_EQ(out.sizes(), inputs.x.sizes());
        EXPECT_LE(relative_difference(out, expected), tolerance) << inputs.x.sizes();
        scalar_of(out).backward();
        scalar_of(expected).backward();
        for (std::size_t i = 0; i < 2; ++i) {
            EXPECT_LE(relative_difference(inputs.all()[i].grad(), exact.all()[i].grad()), tolerance)
                << inputs.x.sizes() << ' ' << i;
        }
    }
}

TEST(RmsNorm, IsTheFormulaOfThePaper) {
    const at::Tensor x = at::tensor({3.0, 4.0}, at::kFloat), scale = at::tensor({1.0, 2.0}, at::kFloat);
    const double root = std::sqrt((9.0 + 16.0) / 2);
    const at::Tensor expected = at::tensor({3 / root, 8 / root}, at::kFloat);
    EXPECT_LE(relative_difference(rms_norm(x, scale, 0.0), expected), 2e-7);  // two roundings
}

TEST(RmsNorm, HasTheSameRowsOnTwoThreads) {
    at::manual_seed(2);
    const Inputs inputs({300, 128});
    const auto run = [&](int threads) {
        at::set_num_threads(threads);
        const at::Tensor out = inputs();
        auto results = torch::autograd::grad({scalar_of(out)}, inputs.all());
        results.push_back(out.detach());
        at::set_num_threads(1);
        return results;
    };
    const auto one = run(1), two = run(2), again = run(2);
    EXPECT_TRUE(same_bits(two[0], one[0]));
    EXPECT_TRUE(same_bits(two[2], one[2]));
    EXPECT_LE(relative_difference(two[1], one[1]), 1e-6);  // a sum over rows, which threads share
    EXPECT_TRUE(same_bits(two[1], again[1]));
}

TEST(RmsNorm, CanBeDifferentiatedTwice) {
    at::manual_seed(3);
    const Inputs inputs({2, 6, 9}), exact = inputs.to(at::kDouble);
    // The gradient of the squared norm of the gradient.
    const auto twice = [](const Inputs& of, const at::Tensor& out) {
        at::Tensor norm = at::zeros({}, out.options());
        for (const at::Tensor& one : torch::autograd::grad({scalar_of(out)}, of.all(), {}, std::nullopt, true)) {
            norm = norm + one.square().sum();
        }
        return torch::autograd::grad({norm}, of.all());
    };
    const auto ours = twice(inputs, inputs()), expected = twice(exact, exact.by_operators());
    for (std::size_t i = 0; i < 2; ++i) EXPECT_LE(relative_difference(ours[i], expected[i]), 1e-5) << i;
}

TEST(RmsNorm, GivesNothingToWhatIsFrozen) {
    at::manual_seed(4);
    for (std::size_t frozen = 0; frozen < 2; ++frozen) {
        const Inputs inputs({3, 8}), all = inputs.to(at::kFloat);
        inputs.all()[frozen].requires_grad_(false);
        scalar_of(inputs()).backward();
        scalar_of(all()).backward();
        EXPECT_FALSE(inputs.all()[frozen].grad().defined());
        EXPECT_TRUE(same_bits(inputs.all()[1 - frozen].grad(), all.all()[1 - frozen].grad()));
    }
}

TEST(RmsNorm, UsesTorchsOperatorsForOtherTypes) {
    at::manual_seed(5);
    const Inputs inputs({4, 12}), exact = inputs.to(at::kDouble), half = inputs.to(at::kBFloat16);
    EXPECT_TRUE(same_bits(exact(), exact.by_operators()));
    EXPECT_EQ(half().scalar_type(), at::kBFloat16);
    // Three roundings to 8 bits: of x, the norm and the product.
    EXPECT_LE(relative_difference(half(), exact()), 3 * 0x1p-8);
}

TEST(RmsNorm, AcceptsRowsThatLieApart) {
    at::manual_seed(6);
    const Inputs inputs({6, 8});
    const at::Tensor apart = inputs.x.detach().t().contiguous().t();
    EXPECT_TRUE(same_bits(rms_norm(apart, inputs.scale, epsilon), inputs()));
    const auto expanded = torch::autograd::grad({inputs().sum()}, inputs.all());
    const at::Tensor result = inputs();
    const auto dense = torch::autograd::grad({result}, inputs.all(), {at::ones_like(result)});
    for (std::size_t i = 0; i < dense.size(); ++i) EXPECT_TRUE(same_bits(expanded[i], dense[i])) << i;
}

TEST(RmsNorm, OfNanIsNanInThatRowAlone) {
    const Inputs inputs({3, 20});
    const at::NoGradGuard no_grad;
    for (const float bad : {std::nanf(""), std::numeric_limits<float>::infinity()}) {
        at::Tensor x = inputs.x.detach().clone();
        x[1][18] = bad;
        const at::Tensor y = rms_norm(x, inputs.scale, epsilon);
        EXPECT_TRUE(y[1][18].isnan().item<bool>());
        EXPECT_TRUE(y[0].isfinite().all().item<bool>() && y[2].isfinite().all().item<bool>());
    }
}

TEST(RmsNorm, OfNoRowsIsEmpty) {
    EXPECT_EQ(rms_norm(at::empty({0, 4}), at::ones({4})).sizes(), at::IntArrayRef({0, 4}));
}

TEST(RmsNorm, RefusesAScaleOfAnotherWidth) {
    for (const auto& [x, scale] : {std::pair{at::ones({2, 8}), at::ones({4})}, std::pair{at::ones({}), at::ones({1})},
                                   std::pair{at::ones({2, 8}), at::ones({2, 8})}}) {
        expect_usage_error({"rms_norm: x is of shape", "scale of shape", "[width]"}, [&] { rms_norm(x, scale); });
    }
}

}  // namespace
