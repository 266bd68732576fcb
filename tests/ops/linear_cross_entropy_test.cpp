#include "microbatch/ops/linear_cross_entropy.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "microbatch/autograd/in_place_gradients.h"
#include "microbatch/memory/budget_allocator.h"
#include "microbatch/ops/cross_entropy.h"
#include "support/errors.h"
#include "support/gradients.h"
#include "support/one_thread.h"

namespace microbatch {
namespace {

using test::expect_usage_error;
using test::relative_difference;

const at::TensorOptions longs = at::TensorOptions().dtype(at::kLong);

/// Random hidden states, weight and targets, some of them ignored; both tensors require grad.
struct Problem {
    Problem(std::vector<std::int64_t> shape, std::int64_t width, std::int64_t vocabulary, at::ScalarType type,
            std::int64_t ignored = -100) {
        targets = at::randint(0, vocabulary, shape, longs);
        targets = targets.masked_fill(at::rand(shape).lt(0.2), ignored);
        shape.push_back(width);
        hidden = at::randn(shape, at::kDouble).to(type).requires_grad_();
        // Logits of about 1: where the loss is near 0 it is the rounding of large ones.
        weight = (at::randn({vocabulary, width}, at::kDouble) / std::sqrt(width)).to(type).requires_grad_();
    }
    at::Tensor hidden, weight, targets;
};

struct Result {
    at::Tensor sum, hidden_gradient, weight_gradient;
};

/// The gradients are those of 1.5 times the sum, so that the incoming one counts.
Result differentiate(const Problem& problem, const at::Tensor& sum) {
    const auto found = torch::autograd::grad({sum * 1.5}, {problem.hidden, problem.weight});
    return {sum.detach(), found[0], found[1]};
}

Result whole(const Problem& p, std::int64_t ignored = -100) {
    return differentiate(p, cross_entropy_sum(at::linear(p.hidden, p.weight), p.targets, ignored));
}

Result in_chunks(const Problem& p, std::int64_t chunk_bytes, std::int64_t ignored = -100) {
    return differentiate(p, linear_cross_entropy_sum(p.hidden, p.weight, p.targets, ignored, chunk_bytes));
}

void expect_agree(const Result& ours, const Result& theirs, double tolerance) {
    EXPECT_EQ(ours.sum.sizes(), theirs.sum.sizes());
    EXPECT_EQ(ours.sum.scalar_type(), theirs.sum.scalar_type());
    EXPECT_LE(relative_difference(ours.sum, theirs.sum), tolerance);
    EXPECT_EQ(ours.hidden_gradient.sizes(), theirs.hidden_gradient.sizes());
    EXPECT_EQ(ours.hidden_gradient.scalar_type(), theirs.hidden_gradient.scalar_type());
    EXPECT_LE(relative_difference(ours.hidden_gradient, theirs.hidden_gradient), tolerance);
    EXPECT_EQ(ours.weight_gradient.scalar_type(), theirs.weight_gradient.scalar_type());
    EXPECT_LE(relative_difference(ours.weight_gradient, theirs.weight_gradient), tolerance);
}

TEST(LinearCrossEntropy, EqualsTheSumOfAllLogitsForEveryShapeAndChunk) {
    at::manual_seed(1);
    const std::vector<std::vector<std::int64_t>> shapes = {{}, {1}, {7}, {50}, {5, 19}, {2, 3, 4}};
    for (const auto& shape : shapes) {
        for (const std::int64_t bytes : {1, 24, 100, 500, 4'000, 100'000}) {
            for (const std::int64_t ignored : {-100, -1, 2}) {  // 2 is a class too
                const Problem wide(shape, 9, 31, at::kDouble, ignored);
                // fp64: rounding of 1e-16 in sums of some hundred terms.
                expect_agree(in_chunks(wide, bytes, ignored), whole(wide, ignored), 1e-12);
                const Problem narrow(shape, 33, 6, at::kFloat, ignored);
                // fp32: rounding of 6e-8 in sums of some hundred terms.
                expect_agree(in_chunks(narrow, bytes, ignored), whole(narrow, ignored), 1e-5);
            }
        }
    }
}

TEST(LinearCrossEntropy, SumsHalfPrecisionInFloat) {
    at::manual_seed(1);
    for (const at::ScalarType type : {at::kBFloat16, at::kHalf}) {
        const Problem problem({300}, 16, 100, type);
        const Result ours = in_chunks(problem, 1'000);
        // Logits and gradients are rounded to 8 bits on both sides, each to 2^-9.
        expect_agree(ours, whole(problem), 1e-2);
        Problem exact = problem;
        exact.hidden = problem.hidden.detach().to(at::kDouble).requires_grad_();
        exact.weight = problem.weight.detach().to(at::kDouble).requires_grad_();
        // One rounding of the gradient's logits and one of the sum: a bfloat16 sum of so many tiles would be off by
        // more.
        const Result small = in_chunks(problem, 200), right = whole(exact);
        EXPECT_LE(relative_difference(small.weight_gradient, right.weight_gradient), 4e-3);
        EXPECT_LE(relative_difference(small.hidden_gradient, right.hidden_gradient), 4e-3);
    }
}

TEST(LinearCrossEntropy, HasTheGradientOfItsSum) {
    at::manual_seed(1);
    const Problem p({11}, 4, 7, at::kDouble);
    const Result result = in_chunks(p, 100);
    const auto sum = [&] {
        const at::NoGradGuard no_grad;
        return 1.5 * linear_cross_entropy_sum(p.hidden, p.weight, p.targets, -100, 100).item<double>();
    };
    for (const auto& [tensor, gradient] :
         {std::pair{p.hidden, result.hidden_gradient}, std::pair{p.weight, result.weight_gradient}}) {
        const at::Tensor numbers = tensor.detach().view({-1});
        for (std::int64_t i = 0; i < numbers.numel(); ++i) {
            const double value = numbers[i].item<double>(), step = 1e-5;
            numbers[i] = value + step;
            const double above = sum();
            numbers[i] = value - step;
            const double below = sum();
            numbers[i] = value;
            // Central difference: h^2 = 1e-10 times the third derivative, and 1e-14 / h.
            EXPECT_NEAR(gradient.view({-1})[i].item<double>(), (above - below) / (2 * step), 1e-7);
        }
    }
}

TEST(LinearCrossEntropy, DifferentiatesOnlyWhatRequiresIt) {
    at::manual_seed(1);
    const Problem p({40}, 8, 12, at::kDouble);
    const Result both = in_chunks(p, 500);
    const auto sum = [&](const at::Tensor& hidden, const at::Tensor& weight) {
        return linear_cross_entropy_sum(hidden, weight, p.targets, -100, 500) * 1.5;
    };
    const at::Tensor grad_hidden = torch::autograd::grad({sum(p.hidden, p.weight.detach())}, {p.hidden})[0];
    const at::Tensor grad_weight = torch::autograd::grad({sum(p.hidden.detach(), p.weight)}, {p.weight})[0];
    EXPECT_TRUE(at::equal(grad_hidden, both.hidden_gradient));
    EXPECT_TRUE(at::equal(grad_weight, both.weight_gradient));
    EXPECT_FALSE(sum(p.hidden.detach(), p.weight.detach()).requires_grad());
    const at::NoGradGuard no_grad;
    EXPECT_FALSE(sum(p.hidden, p.weight).requires_grad());
    EXPECT_EQ(sum(p.hidden, p.weight).item<double>(), 1.5 * both.sum.item<double>());
}

TEST(LinearCrossEntropy, AcceptsTransposedTensors) {
    at::manual_seed(1);
    Problem p({6, 5}, 8, 12, at::kDouble);
    const Result plain = in_chunks(p, 500);
    p.hidden = p.hidden.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_();
    p.weight = p.weight.detach().t().contiguous().t().requires_grad_();
    p.targets = p.targets.t().contiguous().t();
    expect_agree(in_chunks(p, 500), plain, 1e-12);  // fp64 in another order
}

TEST(LinearCrossEntropy, OfIgnoredTargetsAloneIsZeroWithZeroGradients) {
    for (const std::int64_t rows : {0, 5}) {
        Problem p({rows}, 3, 4, at::kFloat);
        p.targets.fill_(-100);
        const Result result = in_chunks(p, 20);
        EXPECT_EQ(result.sum.item<double>(), 0);
        EXPECT_TRUE(at::equal(result.hidden_gradient, at::zeros({rows, 3})));
        EXPECT_TRUE(at::equal(result.weight_gradient, at::zeros({4, 3})));
    }
}

TEST(LinearCrossEntropy, KeepsItsDigitsForHugeLogits) {
    at::manual_seed(1);
    Problem p({20}, 4, 9, at::kFloat);
    p.hidden = (p.hidden.detach() * 1e4).requires_grad_();
    // Both round the same logits: the terms after them are exact to 6e-8.
    expect_agree(in_chunks(p, 100), whole(p), 1e-5);

    Problem close({1}, 1, 2, at::kFloat);  // logits 1e4 and 1e4 + 1/256, exact in fp32
    close.hidden = at::ones({1, 1}).requires_grad_();
    close.weight = at::tensor({10000.0F, 10000.00390625F}).view({2, 1}).requires_grad_();
    close.targets.zero_();
    const double difference = 1.0 / 256;
    for (const std::int64_t bytes : {4, 8}) {  // one tile for each logit, and one for both
        const Result result = in_chunks(close, bytes);
        EXPECT_NEAR(result.sum.item<double>(), std::log1p(std::exp(difference)), 1e-6);  // fp32 of 0.7
        EXPECT_NEAR(result.weight_gradient[1].item<double>(), 1.5 / (1 + std::exp(-difference)), 1e-6);
        Problem negative = close;
        negative.hidden = at::full({1, 1}, -1.0F).requires_grad_();
        EXPECT_NEAR(in_chunks(negative, bytes).sum.item<double>(), std::log1p(std::exp(-difference)), 1e-6);
    }
}

TEST(LinearCrossEntropy, PassesOnWhatIsNotFinite) {
    for (const double bad : {std::nan(""), HUGE_VAL, -HUGE_VAL}) {
        Problem p({20}, 4, 9, at::kFloat);
        p.targets.fill_(3);
        p.hidden.data()[7][2] = bad;
        EXPECT_TRUE(std::isnan(in_chunks(p, 100).sum.item<double>())) << bad;
        EXPECT_TRUE(std::isnan(whole(p).sum.item<double>())) << bad;
    }
}

TEST(LinearCrossEntropy, RefusesAGradientOfAGradient) {
    const Problem p({3}, 2, 4, at::kDouble);
    const at::Tensor sum = linear_cross_entropy_sum(p.hidden, p.weight, p.targets);
    expect_usage_error({"create_graph", "cross_entropy_sum and at::linear"},
                       [&] { torch::autograd::grad({sum}, {p.hidden}, {}, {}, /*create_graph=*/true); });
}

TEST(LinearCrossEntropy, RefusesASecondBackwardThroughTheSameGraph) {
    at::manual_seed(1);
    const Problem p({3}, 2, 4, at::kDouble);
    const at::Tensor sum = linear_cross_entropy_sum(p.hidden, p.weight, p.targets);
    sum.backward({}, /*retain_graph=*/true);
    const at::Tensor gradient = p.weight.grad().clone();
    expect_usage_error({"retain_graph", "call it again"}, [&] { sum.backward(); });
    EXPECT_TRUE(at::equal(p.weight.grad(), gradient));
}

TEST(LinearCrossEntropy, AddsUpOverCallsLikeAnyLoss) {
    at::manual_seed(1);
    const Problem p({40}, 8, 12, at::kDouble);
    Result once = in_chunks(p, 500);
    for (int call = 0; call < 3; ++call) {
        linear_cross_entropy_sum(p.hidden, p.weight, p.targets, -100, 500).backward();
    }
    // fp64: each gradient was multiplied by 1.5 in the one, and three were added in the other.
    EXPECT_LE(relative_difference(p.weight.grad() / 2, once.weight_gradient), 1e-15);
    EXPECT_LE(relative_difference(p.hidden.grad() / 2, once.hidden_gradient), 1e-15);
}

TEST(LinearCrossEntropy, HasTheGradientAtTheWeightThatForwardSaw) {
    at::manual_seed(1);
    const Problem p({40}, 8, 12, at::kDouble);
    const Result right = in_chunks(p, 500);
    const at::Tensor sum = linear_cross_entropy_sum(p.hidden, p.weight, p.targets, -100, 500) * 1.5;
    {
        const at::NoGradGuard no_grad;
        p.weight.mul_(2);
        p.hidden.zero_();
    }
    sum.backward();
    EXPECT_TRUE(at::equal(p.weight.grad(), right.weight_gradient));
    EXPECT_TRUE(at::equal(p.hidden.grad(), right.hidden_gradient));
}

TEST(LinearCrossEntropy, AcceptsAVocabularyOfSeveralTilesOfAnOddSize) {
    at::manual_seed(1);
    for (const at::ScalarType type : {at::kFloat, at::kDouble}) {
        const Problem p({70}, 8, 2501, type);
        // Rounding of 6e-8 (1e-16) in sums of some thousand terms.
        expect_agree(in_chunks(p, 20 * 2501 * 4), whole(p), type == at::kFloat ? 1e-5 : 1e-12);
    }
}

TEST(LinearCrossEntropy, RefusesTargetsOutsideTheVocabulary) {
    for (const std::int64_t target : {-1L, 3L, -101L, 1L << 40}) {
        const at::Tensor targets = at::tensor({0L, target}, longs);
        try {
            linear_cross_entropy_sum(at::randn({2, 4}), at::randn({3, 4}), targets);
            ADD_FAILURE() << target;
        } catch (const c10::IndexError& error) {
            const std::string expected = "Target " + std::to_string(target) + " is out of bounds of a vocabulary of 3";
            EXPECT_NE(std::string(error.what()).find(expected), std::string::npos) << error.what();
        }
    }
}

TEST(LinearCrossEntropy, RefusesMismatchedInputs) {
    const at::Tensor hidden = at::randn({2, 4}), weight = at::randn({3, 4}), targets = at::zeros({2}, longs);
    const auto refuses = [](const std::string& part, const at::Tensor& h, const at::Tensor& w, const at::Tensor& t) {
        expect_usage_error({part}, [&] { linear_cross_entropy_sum(h, w, t); });
    };
    refuses("hidden states of shape [2, 4] do not match targets of shape [3]", hidden, weight, at::zeros({3}, longs));
    refuses("give [..., width] and [...]", at::randn({}), weight, at::zeros({}, longs));
    refuses("weight of shape [3, 5] does not match hidden states of shape [2, 4]", hidden, at::randn({3, 5}), targets);
    refuses("weight of shape [4]", hidden, at::randn({4}), targets);
    refuses("weight of shape [0, 4] has no class", hidden, at::randn({0, 4}), targets);
    refuses("the weight is Double, the hidden states are Float", hidden, weight.to(at::kDouble), targets);
    refuses("Float, not int64", hidden, weight, at::zeros({2}));
    refuses("the hidden states are Long, not floating point", hidden.to(at::kLong), weight, targets);
    refuses("hidden states are an undefined", {}, weight, targets);
    refuses("weight is an undefined", hidden, {}, targets);
    refuses("targets are an undefined", hidden, weight, {});
    expect_usage_error({"chunk_bytes is 0"}, [&] { linear_cross_entropy_sum(hidden, weight, targets, -100, 0); });
}

/// With the budget allocator, whose bytes are exact.
class LinearCrossEntropyMemory : public ::testing::Test {
protected:
    static void SetUpTestSuite() { install_budget_allocator(); }
};

TEST_F(LinearCrossEntropyMemory, IsAChunkAndTheGradientsWhichAreHandedOverWithoutACopy) {
    constexpr std::int64_t rows = 1024, vocabulary = 65536, width = 2, chunk = std::int64_t{16} << 20;
    static_assert(rows * vocabulary * 4 == 256 << 20);
    const Problem p({rows}, width, vocabulary, at::kFloat);
    const std::int64_t before = memory_use().live_bytes;
    constexpr std::int64_t numbers = 64 * rows;  // some columns of one number a row
    constexpr std::int64_t gradients = (rows + vocabulary) * width * 4;
    reset_peak_memory();
    const at::Tensor sum = linear_cross_entropy_sum(p.hidden, p.weight, p.targets, -100, chunk);
    EXPECT_LT(memory_use().peak_bytes - before, chunk + gradients + numbers);
    EXPECT_GT(memory_use().peak_bytes - before, chunk / 2);
    EXPECT_LT(memory_use().live_bytes - before, gradients + numbers);
    const std::int64_t between = memory_use().live_bytes;
    reset_peak_memory();
    sum.backward();
    EXPECT_LT(memory_use().peak_bytes - between, numbers);
}

TEST_F(LinearCrossEntropyMemory, IsAChunkAloneWithoutAGradient) {
    constexpr std::int64_t rows = 1024, vocabulary = 16384, chunk = std::int64_t{4} << 20;
    const Problem p({rows}, 16, vocabulary, at::kFloat);
    const at::NoGradGuard no_grad;
    const std::int64_t before = memory_use().live_bytes;
    reset_peak_memory();
    linear_cross_entropy_sum(p.hidden, p.weight, p.targets, -100, chunk);
    EXPECT_LT(memory_use().peak_bytes - before, chunk + 64 * rows);
}

TEST_F(LinearCrossEntropyMemory, CanRunOutAnywhereWithoutATrace) {
    at::manual_seed(1);
    const Problem p({200}, 16, 64, at::kFloat);
    const std::int64_t live = memory_use().live_bytes;
    int failures = 0;
    for (bool fits = false; !fits;) {
        try {
            const BudgetScope budget(live + 1 + 500 * std::int64_t{failures});
            in_chunks(p, 6'000);
            fits = true;
        } catch (const c10::OutOfMemoryError&) {
            ++failures;
        }
        EXPECT_EQ(memory_use().live_bytes, live);
    }
    EXPECT_GT(failures, 30);
    expect_agree(in_chunks(p, 6'000), whole(p), 1e-5);  // as above
}

TEST(LinearCrossEntropyAtOnce, EqualsTheSumOfAllLogitsForEveryShape) {
    at::manual_seed(31);
    for (const std::vector<std::int64_t>& shape : std::vector<std::vector<std::int64_t>>{{}, {1}, {7}, {5, 19}, {0}}) {
        for (const std::int64_t ignored : {-100, 2}) {  // 2 is a class too
            for (const auto& [width, vocabulary] : {std::pair<std::int64_t, std::int64_t>{33, 6}, {9, 1030}}) {
                const Problem p(shape, width, vocabulary, at::kFloat, ignored);
                // fp32: rounding of 6e-8 in sums of some hundred terms.
                expect_agree(differentiate(p, linear_cross_entropy_sum_at_once(p.hidden, p.weight, p.targets, ignored)),
                             whole(p, ignored), 1e-5);
            }
        }
    }
}

TEST(LinearCrossEntropyAtOnce, AddsTheWeightsGradientWhereItIsInAScope) {
    at::manual_seed(32);
    const Problem p({12}, 9, 31, at::kFloat);
    const InPlaceGradients scope;
    (linear_cross_entropy_sum_at_once(p.hidden, p.weight, p.targets) * 1.5).backward();
    const at::Tensor once = p.weight.grad().clone();
    const void* const place = p.weight.grad().const_data_ptr();
    (linear_cross_entropy_sum_at_once(p.hidden, p.weight, p.targets) * 1.5).backward();
    EXPECT_EQ(p.weight.grad().const_data_ptr(), place);
    EXPECT_LE(relative_difference(p.weight.grad(), once * 2), 1e-6);
    EXPECT_LE(relative_difference(once, whole(p).weight_gradient), 1e-5);
}

TEST(LinearCrossEntropyAtOnce, CanBeDifferentiatedTwice) {
    at::manual_seed(33);
    const Problem p({12}, 9, 31, at::kFloat);
    const auto twice = [&](const at::Tensor& sum) {
        const auto first = torch::autograd::grad({sum}, {p.weight}, {}, true, /*create_graph=*/true);
        return torch::autograd::grad({first[0].square().sum()}, {p.hidden})[0];
    };
    EXPECT_LE(relative_difference(twice(linear_cross_entropy_sum_at_once(p.hidden, p.weight, p.targets)),
                                  twice(cross_entropy_sum(at::linear(p.hidden, p.weight), p.targets))),
              1e-5);
}

TEST(LinearCrossEntropyAtOnce, HoldsTheLogitsOnce) {
    at::manual_seed(34);
    const Problem p({64}, 8, 4096, at::kFloat);
    install_budget_allocator();
    reset_peak_memory();
    const auto before = memory_use().live_bytes;
    linear_cross_entropy_sum_at_once(p.hidden, p.weight, p.targets).backward();
    // The logits, and the gradient of the weight, which is 4096 x 8.
    EXPECT_LE(memory_use().peak_bytes - before, 4 * (64 * 4096 + 4096 * 8) + 20'000);
}

TEST(LinearCrossEntropyAtOnce, RefusesWhatDoesNotMatch) {
    const Problem p({5}, 4, 6, at::kFloat);
    expect_usage_error({"weight"}, [&] { linear_cross_entropy_sum_at_once(p.hidden, at::randn({6, 5}), p.targets); });
    expect_usage_error({"hidden"}, [&] { linear_cross_entropy_sum_at_once(at::randn({4, 4}), p.weight, p.targets); });
}

}  // namespace
}  // namespace microbatch
