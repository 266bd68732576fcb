#include "microbatch/step/order_free_sums.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>

#include "support/gradients.h"
#include "support/models.h"
#include "support/tensors.h"

namespace microbatch {
namespace {

Parameters two_parameters(at::ScalarType type) {
    return {{"weight", at::zeros({40, 7}, type).set_requires_grad(true)},
            {"bias", at::zeros({9}, type).set_requires_grad(true)}};
}

/// The gradients of some summands; those of an element differ by many orders of magnitude.
std::vector<std::vector<at::Tensor>> drawn_gradients(const Parameters& parameters, int count) {
    at::Generator random = test::generator(1);
    std::vector<std::vector<at::Tensor>> all;
    for (int i = 0; i < count; ++i) {
        std::vector<at::Tensor> one;
        for (const Parameter& parameter : parameters) {
            const at::Tensor size = at::randn(parameter.tensor.sizes(), random, at::kDouble).mul(6).exp();
            one.push_back(
                (at::randn(parameter.tensor.sizes(), random, at::kDouble) * size).to(parameter.tensor.scalar_type()));
        }
        all.push_back(one);
    }
    return all;
}

void take(OrderFreeSums& sums, const Parameters& parameters, const std::vector<at::Tensor>& gradients) {
    for (std::size_t i = 0; i < parameters.size(); ++i) parameters[i].tensor.mutable_grad() = gradients[i].clone();
    sums.take();
    test::expect_no_gradients(parameters);
}

GradientRanges ranges_of(const std::vector<std::vector<at::Tensor>>& gradients) {
    GradientRanges ranges(gradients.front().size(), 0.0);
    for (const auto& one : gradients) {
        for (std::size_t i = 0; i < ranges.size(); ++i)
            ranges[i] = std::max(ranges[i], one[i].abs().max().item<double>());
    }
    return ranges;
}

class OrderFreeSumsOf : public testing::TestWithParam<at::ScalarType> {};
INSTANTIATE_TEST_SUITE_P(Types, OrderFreeSumsOf, testing::Values(at::kFloat, at::kDouble, at::kBFloat16));

TEST_P(OrderFreeSumsOf, HaveTheSameBitsInAnyOrderAndInAnyParts) {
    const Parameters parameters = two_parameters(GetParam());
    const auto gradients = drawn_gradients(parameters, 37);
    const GradientRanges ranges = ranges_of(gradients);
    std::mt19937_64 random(2);
    std::optional<std::vector<at::Tensor>> first;
    for (int round = 0; round < 20; ++round) {
        std::vector<std::size_t> order(gradients.size());
        std::iota(order.begin(), order.end(), 0);
        std::ranges::shuffle(order, random);
        const std::size_t parts = 1 + random() % 4;
        std::vector<OrderFreeSums> sums(parts, OrderFreeSums(parameters, ranges, 37));
        for (const std::size_t i : order) take(sums[random() % parts], parameters, gradients[i]);
        std::vector<at::Tensor> total;
        for (const OrderFreeSums& part : sums) {
            const GradientViews views = part.sums();
            for (std::size_t i = 0; i < views.size(); ++i) {
                if (total.size() <= i) {
                    total.push_back(views[i].sum.clone());
                } else {
                    total[i] += views[i].sum;
                }
            }
        }
        if (!first) first = total;
        for (std::size_t i = 0; i < total.size(); ++i) EXPECT_TRUE(test::same_bits(total[i], (*first)[i]));
    }
}

// Each summand loses at most R n 2^-45.
TEST_P(OrderFreeSumsOf, AreTheSumsWithinTheirBound) {
    const Parameters parameters = two_parameters(GetParam());
    const auto gradients = drawn_gradients(parameters, 30);
    const GradientRanges ranges = ranges_of(gradients);
    OrderFreeSums sums(parameters, ranges, 30);
    std::vector<at::Tensor> exact;
    for (const auto& one : gradients) {
        take(sums, parameters, one);
        for (std::size_t i = 0; i < one.size(); ++i) {
            if (exact.size() <= i) exact.push_back(at::zeros_like(one[i], at::kDouble));
            exact[i] += one[i].to(at::kDouble);
        }
    }
    EXPECT_EQ(sums.largest(), ranges);
    for (std::size_t i = 0; i < exact.size(); ++i) {
        const double bound = 30 * ranges[i] * 30 * std::ldexp(1.0, -45) + 30 * ranges[i] * std::ldexp(1.0, -50);
        EXPECT_LE((sums.sums()[i].sum - exact[i]).abs().max().item<double>(), bound);
    }
}

TEST(OrderFreeSums, OfAGradientInAnotherLayoutAreTheSame) {
    const Parameters parameters{{"weight", at::zeros({6, 5}).set_requires_grad(true)}};
    const at::Tensor gradient = at::randn({5, 6}, test::generator(3)).t();
    OrderFreeSums one(parameters, {4.0}, 2), other(parameters, {4.0}, 2);
    take(one, parameters, {gradient});
    take(other, parameters, {gradient.contiguous()});
    EXPECT_TRUE(test::same_bits(one.sums()[0].sum, other.sums()[0].sum));
    EXPECT_EQ(one.largest(), other.largest());
}

TEST(OrderFreeSums, MeasureWhatHasNoRangeYet) {
    const Parameters parameters = two_parameters(at::kFloat);
    OrderFreeSums sums(parameters, {}, 4);
    take(sums, parameters, {at::full({40, 7}, -3.0F), at::full({9}, 0.5F)});
    EXPECT_EQ(sums.largest(), (GradientRanges{3.0, 0.5}));
    EXPECT_EQ(sums.sums()[0].sum.abs().max().item<double>(), 0.0);
}

TEST(OrderFreeSums, AreNotFiniteIfAGradientIsNot) {
    constexpr float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
    const Parameters parameters{{"weight", at::zeros({3}).set_requires_grad(true)}};
    OrderFreeSums sums(parameters, {1.0}, 4);
    take(sums, parameters, {test::tensor_of({nan, -infinity, 0.5F}, at::kFloat)});
    take(sums, parameters, {test::tensor_of({1.0F, 1.0F, 0.5F}, at::kFloat)});
    const at::Tensor sum = sums.sums()[0].sum;
    EXPECT_TRUE(std::isnan(sum[0].item<double>()));
    EXPECT_EQ(sum[1].item<double>(), -infinity);
    EXPECT_EQ(sum[2].item<double>(), 1.0);
    EXPECT_EQ(sums.largest()[0], infinity);
}

TEST(GradientRanges, AreExceededBeyond64Times) {
    EXPECT_FALSE(exceeds({64.0, 0.0}, {1.0, 0.0}));
    EXPECT_TRUE(exceeds({std::nextafter(64.0, 65.0), 0.0}, {1.0, 0.0}));
    EXPECT_TRUE(exceeds({1.0, 1e-30}, {1.0, 0.0}));
    EXPECT_FALSE(exceeds({std::numeric_limits<double>::infinity()}, {1.0}));
}

}  // namespace
}  // namespace microbatch
