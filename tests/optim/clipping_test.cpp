#include "microbatch/optim/clipping.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <torch/nn/utils/clip_grad.h>

#include <bit>
#include <cmath>
#include <limits>
#include <random>

#include "microbatch/memory/budget_allocator.h"
#include "support/one_thread.h"

namespace microbatch {
namespace {

constexpr double nan = std::numeric_limits<double>::quiet_NaN();
constexpr double infinity = std::numeric_limits<double>::infinity();

/// Square root of the sum of squares by Neumaier's compensated summation in fp64: exact to about 1e-16.
double compensated_norm(const at::Tensor& tensor) {
    const float* values = tensor.const_data_ptr<float>();
    double sum = 0.0, lost = 0.0;
    for (std::int64_t i = 0; i < tensor.numel(); ++i) {
        const double square = static_cast<double>(values[i]) * values[i];
        const double next = sum + square;
        lost += std::fabs(sum) >= square ? (sum - next) + square : (square - next) + sum;
        sum = next;
    }
    return std::sqrt(sum + lost);
}

/// Between what fp64 gives in any sensible order (about 1e-13) and the best that fp32 could (6e-8).
constexpr double fp64_accuracy = 1e-11;

TEST(JointNorm, IsSummedInFp64OverFortyMillionElements) {
    // One large element first: next to 2^26, each of the small squares is lost in fp32; together they are 0.3 of it.
    at::Tensor values = at::empty({40'000'000});
    float* data = values.mutable_data_ptr<float>();
    std::uint64_t state = 1;
    for (std::int64_t i = 0; i < values.numel(); ++i) {
        state = state * 6364136223846793005u + 1442695040888963407u;  // Knuth's generator
        data[i] = static_cast<float>(state >> 40) / static_cast<float>(1 << 24);
    }
    data[0] = 8192.0F;
    const double expected = compensated_norm(values);
    EXPECT_NEAR(joint_norm({values}) / expected, 1.0, fp64_accuracy);

    // Exponents all over fp32's range, denormals included: squares from 1e-80 to 1e70 overflow and vanish in fp32.
    for (std::int64_t i = 0; i < values.numel(); ++i) {
        const std::uint32_t exponent = static_cast<std::uint32_t>(i % 240);
        data[i] = std::bit_cast<float>((exponent << 23) | (std::bit_cast<std::uint32_t>(data[i]) & 0x7FFFFF));
    }
    EXPECT_NEAR(joint_norm({values}) / compensated_norm(values), 1.0, fp64_accuracy);
}

TEST(JointNorm, HasTheSameBitsOnEveryNumberOfThreads) {
    at::manual_seed(3);
    const std::vector<at::Tensor> tensors = {at::randn({1'000'003}), at::randn({7}), at::randn({0}),
                                             at::randn({300, 400}, at::kDouble), at::randn({65'536})};
    const double norm = joint_norm(tensors);
    for (const int threads : {2, 3}) {
        at::set_num_threads(threads);
        EXPECT_EQ(joint_norm(tensors), norm);
    }
    at::set_num_threads(1);
}

TEST(JointNorm, NeitherOverflowsNorVanishesInFp32) {
    EXPECT_NEAR(joint_norm({at::full({100}, 1e30F)}), 10 * static_cast<double>(1e30F), 1e18);
    EXPECT_NEAR(joint_norm({at::full({100}, 1e-42F)}), 10 * static_cast<double>(1e-42F), 1e-54);
}

TEST(JointNorm, IsOneNormOverAllTensors) {
    EXPECT_EQ(joint_norm({}), 0.0);
    EXPECT_EQ(joint_norm({at::empty({0}), at::empty({3, 0})}), 0.0);
    EXPECT_EQ(joint_norm({at::full({}, -3.0), at::empty({0}), at::full({1, 1}, 4.0, at::kDouble)}), 5.0);
    EXPECT_EQ(joint_norm({at::full({4}, 3.0, at::kBFloat16), at::full({4, 4}, -4.0)}), std::sqrt(4 * 9.0 + 16 * 16.0));
}

TEST(JointNorm, DoesNotDependOnShapeOrderAndLayout) {
    at::manual_seed(1);
    const at::Tensor x = at::randn({60, 50}, at::kDouble);
    const double norm = joint_norm({x});
    const double tolerance = 1e-13 * norm;  // another order of 3000 sums in fp64
    EXPECT_NEAR(joint_norm({x.t(), at::empty({0})}), norm, tolerance);
    EXPECT_NEAR(joint_norm({x.slice(0, 17), x.slice(0, 0, 17)}), norm, tolerance);
    EXPECT_NEAR(joint_norm({x.slice(1, 0, 50, 2), x.slice(1, 1, 50, 2).flatten()}), norm, tolerance);
    EXPECT_NEAR(joint_norm({x}), std::sqrt((x * x).sum().item<double>()), tolerance);
}

TEST(JointNorm, IsNotFiniteIfAnyElementIsNot) {
    for (const double bad : {nan, infinity, -infinity}) {
        for (const auto dtype : {at::kFloat, at::kDouble}) {
            at::Tensor last = at::ones({1001}, dtype);
            last[1000] = bad;
            const double norm = joint_norm({at::ones({7}), last, at::ones({3})});
            EXPECT_TRUE(std::isnan(bad) ? std::isnan(norm) : std::isinf(norm)) << bad << ' ' << norm;
        }
    }
    EXPECT_FALSE(std::isfinite(joint_norm({at::full({1}, infinity), at::full({1}, nan)})));
}

TEST(ClipCoefficient, IsWhatTorchMultipliesGradientsBy) {
    std::mt19937_64 random(2);
    std::uniform_real_distribution<double> exponent(-4, 4);
    int clipped = 0;
    for (int trial = 0; trial < 200; ++trial) {
        const double limit = std::pow(10, exponent(random)), size = std::pow(10, exponent(random));
        const at::Tensor p = at::zeros({10}, at::kDouble).requires_grad_();
        const at::Tensor g = at::full({10}, size, at::kDouble);
        p.mutable_grad() = g.clone();
        torch::nn::utils::clip_grad_norm_({p}, limit);
        const double theirs = (p.grad()[3] / g[3]).item<double>();
        const double ours = clip_coefficient(joint_norm({g}), limit);
        EXPECT_NEAR(ours / theirs, 1.0, 1e-14) << "norm " << size << ", limit " << limit;  // a few roundings
        EXPECT_LE(ours, 1.0);
        clipped += ours < 1.0 ? 1 : 0;
    }
    EXPECT_GT(clipped, 50);
    EXPECT_LT(clipped, 150);
}

TEST(ClipCoefficient, HasTorchsMillionthInTheDenominator) {
    EXPECT_EQ(clip_coefficient(1.0, 1.0), 1.0 / (1.0 + 1e-6));
    EXPECT_EQ(clip_coefficient(0.0, 1e-7), 1e-7 / 1e-6);
    EXPECT_EQ(clip_coefficient(0.0, 1.0), 1.0);
    EXPECT_EQ(clip_coefficient(3.0, 4.0), 1.0);
}

TEST(ClipCoefficient, DoesNotHideANormThatIsNotFinite) {
    EXPECT_TRUE(std::isnan(clip_coefficient(nan, 1.0)));
    EXPECT_EQ(clip_coefficient(infinity, 1.0), 0.0);
}

TEST(ClipCoefficient, IsOneWithoutALimit) {
    for (const double norm : {0.0, 1.0, 1e300, infinity, nan}) EXPECT_EQ(clip_coefficient(norm, infinity), 1.0);
}

TEST(JointNorm, NeedsLittleMemoryWhateverTheSize) {
    install_budget_allocator();
    const at::Tensor large = at::ones({3000, 1000});
    const std::int64_t before = memory_use().live_bytes;
    reset_peak_memory();
    joint_norm({large, large.t()});
    EXPECT_EQ(memory_use().peak_bytes, before);  // by way of torch it would be 24 MB
}

}  // namespace
}  // namespace microbatch
