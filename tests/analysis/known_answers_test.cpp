// Stochastic gradient descent on quadratics with known answers: the measurements must match the formulas.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>

#include "microbatch/core/learning_rate.h"
#include "microbatch/core/noise_scale.h"
#include "microbatch/optim/sgd.h"
#include "microbatch/step/accumulator.h"
#include "support/models.h"

namespace microbatch {
namespace {

using namespace test;

constexpr std::int64_t size = 4000;  // directions: so many that one draw is a mean
constexpr double curvature = 0.5;
constexpr double deviation = 2.0;  // of a sample's minimum from the problem's, in each direction

/// Loss of a sample: half the curvature times the squared distance from its own minimum, which is normal about 0.
struct Bowl {
    at::Tensor theta = at::zeros({size}, at::kDouble).requires_grad_();
    Parameters parameters{{"theta", theta}};
    at::Generator random = generator(1);
    Sgd optimizer;
    Accumulator accumulator;

    Bowl(double rate, std::int64_t micro_batch)
        : optimizer({{.parameters = parameters}}, {.learning_rate = rate}),
          accumulator(parameters, optimizer, {.plan = {.micro_batch = micro_batch}}) {}

    StepReport step(std::int64_t batch, const StepOptions& options = {}) {
        const Batch samples{{normal({batch, size}, random) * deviation}};
        return accumulator.step(
            samples,
            [&](const Batch& micro) -> WeightedLoss {
                return {0.5 * curvature * (theta - micro.fields[0]).square().sum(), static_cast<double>(micro.size())};
            },
            options);
    }
    double mean_square() const { return theta.detach().square().mean().item<double>(); }
    void move_to(double distance) const {
        const at::NoGradGuard no_grad;
        at::Tensor(theta).fill_(distance);
    }
};

// theta -= rate (curvature theta + noise): variance rate * curvature * deviation^2 / (batch (2 - rate * curvature)).
double stationary_variance(double rate, std::int64_t batch) {
    return rate * curvature * deviation * deviation / (static_cast<double>(batch) * (2.0 - rate * curvature));
}

double measured_variance(double rate, std::int64_t batch, std::int64_t micro_batch) {
    Bowl bowl(rate, micro_batch);
    // It forgets where it came from by a factor of 1 - rate * curvature a step.
    const int forget = static_cast<int>(10.0 / (rate * curvature));
    for (int i = 0; i < forget; ++i) bowl.step(batch);
    double sum = 0.0;
    constexpr int looks = 20;
    for (int look = 0; look < looks; ++look) {
        for (int i = 0; i < forget / 10; ++i) bowl.step(batch);
        sum += bowl.mean_square() / looks;
    }
    return sum;
}

TEST(KnownAnswers, TheStationaryVarianceIsThatOfTheWholeBatchHoweverItIsSplit) {
    for (const auto& [batch, micro_batch] : {std::pair{4, 4}, {4, 1}, {7, 3}}) {
        const double rate = 0.8;
        // 80,000 numbers, with hardly any correlation within a direction: accurate to half a percent.
        EXPECT_NEAR(measured_variance(rate, batch, micro_batch) / stationary_variance(rate, batch), 1, 0.02)
            << batch << " " << micro_batch;
    }
}

TEST(KnownAnswers, TheLinearRuleKeepsTheStationaryVariance) {
    const double small = 0.05;
    const double large = scale_to_batch({.learning_rate = small}, RateRule::linear, 2, 8).learning_rate;
    const double ratio = measured_variance(large, 8, 2) / measured_variance(small, 2, 2);
    // But for (2 - rate * curvature): the rule is of small steps.
    EXPECT_NEAR(ratio, (2 - small * curvature) / (2 - large * curvature), 0.03);
}

TEST(KnownAnswers, NoiseAndGradientAreThoseOfTheProblem) {
    Bowl bowl(0.0, 2);
    const double distance = 0.3;
    bowl.move_to(distance);
    NoiseAverage average(0.99);
    for (int i = 0; i < 200; ++i) average.add(*bowl.step(8, {.measure_noise = true}).noise);
    const double variance = size * std::pow(curvature * deviation, 2),
                 gradient = size * std::pow(curvature * distance, 2);
    EXPECT_NEAR(average.mean()->variance / variance, 1, 0.01);
    EXPECT_NEAR(average.mean()->squared_gradient / gradient, 1, 0.02);
    EXPECT_NEAR(*average.noise_batch() / (variance / gradient), 1, 0.02);
}

TEST(KnownAnswers, TheBestRateIsThatOfTheMeasuredNoise) {
    const double distance = 0.5;
    for (const std::int64_t batch : {4, 16, 64}) {
        // The mean loss after a step is a parabola in the rate: three rates give its lowest point.
        const auto loss_after = [&](double rate) {
            Bowl bowl(rate, 4);
            double sum = 0.0;
            for (int i = 0; i < 20; ++i) {
                bowl.move_to(distance);
                bowl.step(batch);
                sum += bowl.mean_square() / 20;
            }
            return sum;
        };
        const double step = 0.2, before = loss_after(0.0), once = loss_after(step), twice = loss_after(2 * step);
        const double best = step * (twice - 4 * once + 3 * before) / (2 * (twice - 2 * once + before));
        Bowl bowl(0.0, 2);
        bowl.move_to(distance);
        NoiseAverage average(0.99);
        for (int i = 0; i < 100; ++i) average.add(*bowl.step(8, {.measure_noise = true}).noise);
        // McCandlish et al. 2018, equation 2.6: the largest useful rate is 1 / curvature.
        const double wanted = 1 / curvature / (1 + *average.noise_batch() / static_cast<double>(batch));
        EXPECT_NEAR(best / wanted, 1, 0.02) << batch;
    }
}

}  // namespace
}  // namespace microbatch
