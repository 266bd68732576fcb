#include "microbatch/ops/cross_entropy.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "support/errors.h"

using microbatch::count_targets;
using microbatch::cross_entropy_sum;
using microbatch::test::expect_usage_error;

namespace {

const at::TensorOptions doubles = at::TensorOptions().dtype(at::kDouble);
const at::TensorOptions longs = at::TensorOptions().dtype(at::kLong);

at::Tensor explicit_sum(const at::Tensor& logits, const at::Tensor& targets, std::int64_t ignored) {
    const at::Tensor counted = targets.ne(ignored);
    const at::Tensor safe = targets.where(counted, at::zeros_like(targets));
    const at::Tensor picked = at::log_softmax(logits, -1).gather(-1, safe.unsqueeze(-1)).squeeze(-1);
    return -(picked * counted).sum();
}

void expect_usage(const at::Tensor& logits, const at::Tensor& targets, const std::string& part) {
    expect_usage_error({part}, [&] { cross_entropy_sum(logits, targets); });
}

}  // namespace

TEST(CrossEntropy, EqualsLogSoftmaxAndGatherWithGradientsForEveryShape) {
    at::manual_seed(1);
    const std::vector<std::vector<std::int64_t>> shapes = {{}, {1}, {7}, {3, 5}, {2, 3, 4}};
    for (const auto& shape : shapes) {
        for (const std::int64_t ignored : {-100, -1, 2}) {  // 2 is a class too
            std::vector<std::int64_t> with_classes = shape;
            with_classes.push_back(6);
            const at::Tensor ours = (at::randn(with_classes, doubles) * 10).requires_grad_();
            const at::Tensor theirs = ours.detach().clone().requires_grad_();
            at::Tensor targets = at::randint(0, 6, shape, longs);
            targets = targets.masked_fill(at::rand(shape, doubles).lt(0.3), ignored);
            const at::Tensor sum = cross_entropy_sum(ours, targets, ignored);
            const at::Tensor expected = explicit_sum(theirs, targets, ignored);
            EXPECT_EQ(sum.dim(), 0);
            sum.backward();
            expected.backward();
            // Both add the same numbers in fp64, in another order.
            EXPECT_TRUE(at::allclose(sum, expected, 1e-13, 1e-13)) << sum << expected;
            EXPECT_TRUE(at::allclose(ours.grad(), theirs.grad(), 1e-13, 1e-13));
        }
    }
}

TEST(CrossEntropy, IsTheLogarithmOfTheClassesForEqualLogits) {
    const at::Tensor sum = cross_entropy_sum(at::zeros({3, 8}, doubles), at::arange(3, longs));
    EXPECT_NEAR(sum.item<double>(), 3 * std::log(8.0), 1e-14);  // the analytic value; rounding of three terms
}

TEST(CrossEntropy, IgnoresMinusHundredByDefault) {
    const at::Tensor logits = at::randn({2, 4}, doubles);
    const at::Tensor targets = at::tensor({3, -100}, longs);
    EXPECT_EQ(cross_entropy_sum(logits, targets).item<double>(),
              cross_entropy_sum(logits.narrow(0, 0, 1), targets.narrow(0, 0, 1)).item<double>());
    EXPECT_EQ(count_targets(targets).item<std::int64_t>(), 1);
    EXPECT_EQ(count_targets(targets, 3).item<std::int64_t>(), 1);
    EXPECT_EQ(count_targets(targets, -1).item<std::int64_t>(), 2);
}

TEST(CrossEntropy, OfIgnoredTargetsAloneIsZeroWithZeroGradients) {
    for (const std::int64_t rows : {0, 5}) {
        const at::Tensor logits = at::randn({rows, 3}).requires_grad_();
        const at::Tensor targets = at::full({rows}, -100, longs);
        const at::Tensor sum = cross_entropy_sum(logits, targets);
        sum.backward();
        EXPECT_EQ(sum.item<double>(), 0);
        EXPECT_TRUE(at::equal(logits.grad(), at::zeros({rows, 3})));
        EXPECT_EQ(count_targets(targets).item<std::int64_t>(), 0);
    }
}

TEST(CrossEntropy, StaysFiniteForHugeLogits) {
    const at::Tensor logits = at::tensor({1e30F, 0.0F, -1e30F}).view({1, 3}).requires_grad_();
    const at::Tensor sum = cross_entropy_sum(logits, at::tensor({1}, longs));
    sum.backward();
    EXPECT_EQ(sum.item<float>(), 1e30F);
    EXPECT_TRUE(at::equal(logits.grad(), at::tensor({1.0F, -1.0F, 0.0F}).view({1, 3})));
}

TEST(CrossEntropy, AcceptsTransposedLogits) {
    const at::Tensor logits = at::randn({5, 3, 2}, doubles).transpose(0, 2);
    const at::Tensor targets = at::randint(0, 5, {3, 2}, longs).t();
    EXPECT_EQ(cross_entropy_sum(logits, targets).item<double>(),
              cross_entropy_sum(logits.contiguous(), targets.contiguous()).item<double>());
}

TEST(CrossEntropy, SumsHalfPrecisionLogitsInFloat) {
    for (const at::ScalarType type : {at::kBFloat16, at::kHalf}) {
        const at::Tensor logits = at::randn({1000, 4}).to(type).requires_grad_();
        const at::Tensor targets = at::randint(0, 4, {1000}, longs);
        const at::Tensor sum = cross_entropy_sum(logits, targets);
        const double exact = explicit_sum(logits.detach().to(at::kDouble), targets, -100).item<double>();
        EXPECT_EQ(sum.scalar_type(), at::kFloat);
        EXPECT_NEAR(sum.item<double>(), exact, 1e-5 * exact);  // fp32; a bfloat16 sum would be off by up to 4e-3
        sum.backward();
        EXPECT_EQ(logits.grad().scalar_type(), type);
    }
}

TEST(CrossEntropy, RefusesTargetsOutsideTheClasses) {
    for (const std::int64_t target : {-1L, 3L, -101L, 1L << 40}) {
        const at::Tensor targets = at::tensor({0L, target}, longs);
        EXPECT_THROW(cross_entropy_sum(at::randn({2, 3}), targets), c10::IndexError) << target;
        EXPECT_THROW(cross_entropy_sum(at::randn({1, 2, 3}), targets.view({1, 2})), c10::IndexError) << target;
    }
}

TEST(CrossEntropy, RefusesMismatchedInputs) {
    const at::Tensor logits = at::randn({2, 3});
    expect_usage(logits, at::zeros({3}, longs), "[2, 3] do not match targets of shape [3]");
    expect_usage(logits, at::zeros({2, 1}, longs), "shape [2, 1]");
    expect_usage(logits, at::zeros({}, longs), "shape []");
    expect_usage(at::randn({}), at::zeros({}, longs), "logits of shape []");
    expect_usage(at::randn({6, 4}), at::zeros({4, 6}, longs), "shape [4, 6]");
    expect_usage(at::randn({0, 0}), at::zeros({0}, longs), "no class");
    expect_usage(logits, at::zeros({2}), "Float, not int64");
    expect_usage(logits.to(at::kLong), at::zeros({2}, longs), "not floating point");
    expect_usage({}, at::zeros({2}, longs), "logits are an undefined");
    expect_usage(logits, {}, "targets are an undefined");
    expect_usage_error({"targets are an undefined"}, [] { count_targets({}); });
    expect_usage_error({"Float, not int64"}, [] { count_targets(at::zeros({2})); });
}
