#include "microbatch/analysis/gradient_variance.h"

#include <gtest/gtest.h>

#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "support/errors.h"
#include "support/gradients.h"
#include "support/models.h"

namespace microbatch {
namespace {

using test::expect_usage_error;

constexpr std::int64_t width = 10;

/// Loss w.x a sample, weighted by the sample's weight: its gradient is x, whatever w is.
struct Linear {
    explicit Linear(at::ScalarType type = at::kDouble) : w(at::ones({width}, type).requires_grad_()) {}

    Parameters parameters() const { return {{"w", w}}; }
    LossFunction loss() const {
        return [w = w](const Batch& b) -> WeightedLoss {
            return {(at::mv(b.fields[0], w) * b.fields[1]).sum(), b.fields[1].sum().item<double>()};
        };
    }
    at::Tensor w;
};

/// x = mean + deviation * normal, each with weight 1.
Batch draw(std::int64_t samples, at::Generator& random, double mean, const at::Tensor& deviation) {
    const at::Tensor x = test::normal({samples, width}, random) * deviation + mean;
    return {{x, at::ones({samples}, at::kDouble)}};
}

/// Gives the batches one after the other; asking for more fails.
std::function<Batch()> one_by_one(const std::vector<Batch>& batches, std::size_t& given) {
    return [&batches, &given] { return batches.at(given++); };
}

/// The definition, in two passes: mean of the mean gradients, then squared distances from it.
GradientVariance by_definition(const std::vector<Batch>& batches) {
    std::vector<at::Tensor> rows;
    for (const Batch& b : batches) {
        const at::Tensor x = b.fields[0].to(at::kDouble), weight = b.fields[1].to(at::kDouble);
        rows.push_back(at::mv(x.t(), weight) / weight.sum());
    }
    const at::Tensor g = at::stack(rows), mean = g.mean(0);
    return {(g - mean).square().sum().item<double>() / static_cast<double>(rows.size() - 1),
            mean.square().sum().item<double>(), static_cast<std::int64_t>(rows.size())};
}

std::vector<Batch> random_batches(std::size_t count, double mean, bool weighted) {
    at::Generator random = test::generator(1);
    std::vector<Batch> batches;
    for (std::size_t i = 0; i < count; ++i) {
        batches.push_back(draw(3 + static_cast<std::int64_t>(i % 5), random, mean, at::ones({width}, at::kDouble)));
        if (weighted) batches.back().fields[1] = test::wide_weights(batches.back().size(), random);
    }
    return batches;
}

TEST(GradientVariance, IsTheUnbiasedVarianceOfTheMeanGradients) {
    const Linear model;
    for (const bool weighted : {false, true}) {
        for (const std::size_t count : {2, 3, 40}) {
            const auto batches = random_batches(count, 0.5, weighted);
            const GradientVariance expected = by_definition(batches);
            for (const std::int64_t micro_batch : {std::int64_t{1}, std::int64_t{2}, whole_batch}) {
                std::size_t given = 0;
                const GradientVariance found =
                    gradient_variance(model.parameters(), static_cast<std::int64_t>(count), one_by_one(batches, given),
                                      {.micro_batch = micro_batch}, model.loss());
                // fp64 with a mean of the size of the deviation: the formula loses two digits at most.
                EXPECT_NEAR(found.variance / expected.variance, 1.0, 1e-12);
                EXPECT_NEAR(found.mean_squared / expected.mean_squared, 1.0, 1e-12);
                EXPECT_EQ(found.batches, static_cast<std::int64_t>(count));
                EXPECT_EQ(given, count);
            }
        }
    }
}

TEST(GradientVariance, IsSummedInFp64ForFp32Parameters) {
    const Linear model(at::kFloat);
    auto batches = random_batches(400, 1000.0, false);
    for (Batch& batch : batches) {
        for (at::Tensor& field : batch.fields) field = field.to(at::kFloat);
    }
    std::size_t given = 0;
    const GradientVariance found =
        gradient_variance(model.parameters(), 400, one_by_one(batches, given), {}, model.loss());
    // A mean 1000 times the deviation: rounding a gradient to fp32 costs 1e-4 of the deviation, summing gradients in
    // fp32, or dividing them there, costs 10 % and 0.5 % of the variance.
    EXPECT_NEAR(found.variance / by_definition(batches).variance, 1.0, 1e-3);
}

TEST(GradientVariance, OfBatchesOfBSamplesIsTheTraceOfTheCovarianceOverB) {
    const Linear model;
    const at::Tensor deviation = at::linspace(0.5, 1.5, width, at::kDouble);
    const double trace = deviation.square().sum().item<double>();
    constexpr std::int64_t batches = 800;
    // Of normal gradients the variance's own relative deviation is sqrt(2 sum s^4 / (R-1)) / sum s^2: here 1.9 %.
    const double spread = std::sqrt(2 * deviation.pow(4).sum().item<double>() / (batches - 1)) / trace;
    EXPECT_LT(spread, 0.02);
    for (const std::int64_t size : {1, 4, 16}) {
        at::Generator random = test::generator(10 + static_cast<std::uint64_t>(size));
        const GradientVariance found = gradient_variance(
            model.parameters(), batches, [&] { return draw(size, random, 0.25, deviation); }, {}, model.loss());
        const double expected = trace / static_cast<double>(size);
        EXPECT_NEAR(found.variance / expected, 1.0, 4 * spread) << size;
        // |mean|^2 has the mean's own noise in it, variance / R, as the header says; 4 deviations of 2 mean . noise.
        const double squared = width * 0.25 * 0.25;
        EXPECT_NEAR(found.mean_squared, squared + expected / batches, 8 * std::sqrt(squared * 2.25 / size / batches));
    }
}

TEST(GradientVariance, OfTheSameBatchAgainAndAgainIsZero) {
    const Linear model;
    at::Generator random = test::generator(2);
    for (const double mean : {0.0, 1.0, 1e6}) {
        const Batch batch = draw(7, random, mean, at::ones({width}, at::kDouble));
        const GradientVariance found = gradient_variance(
            model.parameters(), 30, [&] { return batch; }, {}, model.loss());
        EXPECT_GE(found.variance, 0.0);                         // a variance is never negative, rounding or not
        EXPECT_LE(found.variance, 1e-14 * found.mean_squared);  // the digits that the formula cancels
    }
}

TEST(GradientVariance, CoversAllParameters) {
    const auto model = test::make_mlp(3);
    const Parameters parameters = parameters_of(*model);
    const LossFunction loss = test::weighted_squares(model);
    std::vector<Batch> batches;
    std::vector<test::Named> oracle;
    for (std::uint64_t seed = 0; seed < 6; ++seed) {
        batches.push_back(test::regression_batch(4, seed));
        oracle.push_back(test::oracle_gradients(parameters, batches.back(), loss));
    }
    double variance = 0.0;
    for (std::size_t p = 0; p < parameters.size(); ++p) {
        std::vector<at::Tensor> rows;
        for (const auto& gradients : oracle) rows.push_back(gradients[p].tensor.flatten());
        const at::Tensor g = at::stack(rows);
        variance += (g - g.mean(0)).square().sum().item<double>() / 5;
    }
    const test::Named before = test::values_of(parameters);
    std::size_t given = 0;
    const GradientVariance found =
        gradient_variance(parameters, 6, one_by_one(batches, given), {.micro_batch = 3}, loss);
    EXPECT_NEAR(found.variance / variance, 1.0, 1e-10);  // the split changes only rounding, over weights of 9 decades
    test::expect_same_bits(test::values_of(parameters), before);
    test::expect_no_gradients(parameters);
}

TEST(GradientVariance, NeedsTwoBatches) {
    const Linear model;
    int asked = 0;
    const auto next = [&] {
        ++asked;
        return random_batches(1, 0.0, false)[0];
    };
    for (const std::int64_t few : {-1, 0, 1}) {
        expect_usage_error({"batches", std::to_string(few)},
                           [&] { gradient_variance(model.parameters(), few, next, {}, model.loss()); });
    }
    EXPECT_EQ(asked, 0);
}

TEST(GradientVariance, RefusesABatchOfNoWeightOrNoSamples) {
    const Linear model;
    auto batches = random_batches(3, 0.0, false);
    batches[1].fields[1].zero_();
    std::size_t given = 0;
    expect_usage_error({"weight"},
                       [&] { gradient_variance(model.parameters(), 3, one_by_one(batches, given), {}, model.loss()); });
    test::expect_no_gradients(model.parameters());
    batches[1] = batches[1].slice(0, 0);
    given = 0;
    expect_usage_error({"empty"},
                       [&] { gradient_variance(model.parameters(), 3, one_by_one(batches, given), {}, model.loss()); });
    test::expect_no_gradients(model.parameters());
}

TEST(GradientVariance, RefusesGradientsThatAreThere) {
    const Linear model;
    model.w.mutable_grad() = at::ones({width}, at::kDouble);
    const auto batches = random_batches(2, 0.0, false);
    std::size_t given = 0;
    expect_usage_error({"w"},
                       [&] { gradient_variance(model.parameters(), 2, one_by_one(batches, given), {}, model.loss()); });
}

TEST(GradientVariance, LeavesNoGradientsWhereAnyCallThrows) {
    const Linear model;
    const auto batches = random_batches(3, 0.0, false);
    for (int throwing = 1; throwing <= 6; ++throwing) {
        int call = 0;
        std::size_t given = 0;
        const LossFunction loss = [&](const Batch& b) {
            if (++call == throwing) throw std::domain_error("the user's own");
            return model.loss()(b);
        };
        const auto next = [&] {
            if (throwing == 6 && given == 2) throw std::domain_error("no more data");
            return batches.at(given++);
        };
        EXPECT_THROW(gradient_variance(model.parameters(), 3, next, {.micro_batch = 2}, loss), std::domain_error);
        test::expect_no_gradients(model.parameters());
        EXPECT_TRUE(at::equal(model.w, at::ones({width}, at::kDouble)));
    }
}

}  // namespace
}  // namespace microbatch
