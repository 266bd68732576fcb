#include "microbatch/core/learning_rate.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <string>

#include "support/errors.h"

namespace microbatch {
namespace {

using test::expect_usage_error;

constexpr RateRule all_rules[] = {RateRule::none, RateRule::linear, RateRule::sqrt, RateRule::adam_sde,
                                  RateRule::beta2_time};

RateConstants adam(double rate = 1e-3) {
    return {.learning_rate = rate, .adam = RateConstants::Adam{}};
}

TEST(RateRule, NamesAreReadAndWritten) {
    for (const RateRule rule : all_rules) EXPECT_EQ(parse_rate_rule(to_string(rule)), rule);
    expect_usage_error({"unknown rule \"cubic\"", "none, linear, sqrt, adam-sde, beta2-time"},
                       [] { parse_rate_rule("cubic"); });
}

TEST(RateRule, LinearIsThatOfGoyal) {
    // arXiv:1706.02677, section 5: 0.1 at 256 images becomes 3.2 at 8192.
    EXPECT_DOUBLE_EQ(scale_to_batch({.learning_rate = 0.1}, RateRule::linear, 256, 8192).learning_rate, 3.2);
}

TEST(RateRule, SquareRootIsThatOfKrizhevsky) {
    // arXiv:1404.5997, section 4: k times the batch, sqrt(k) times the rate.
    EXPECT_DOUBLE_EQ(scale_to_batch({.learning_rate = 0.01}, RateRule::sqrt, 128, 512).learning_rate, 0.02);
}

TEST(RateRule, AdamAsADifferentialEquationIsThatOfMalladi) {
    // arXiv:2205.10287, definition 5.2 with kappa = 4.
    const RateConstants scaled = scale_to_batch(adam(), RateRule::adam_sde, 64, 256);
    EXPECT_DOUBLE_EQ(scaled.learning_rate, 2e-3);
    EXPECT_DOUBLE_EQ(scaled.adam->beta1, 0.6);
    EXPECT_DOUBLE_EQ(scaled.adam->beta2, 0.996);
    EXPECT_DOUBLE_EQ(scaled.adam->epsilon, 5e-9);
}

TEST(RateRule, TheSecondMomentForgetsAfterAsManySamples) {
    // arXiv:2507.07101, section 3: the half-life in samples, batch ln(1/2) / ln(beta2), stays.
    const RateConstants scaled = scale_to_batch(adam(), RateRule::beta2_time, 512, 1);
    const auto half_life = [](double beta2, double batch) { return batch * std::log(0.5) / std::log(beta2); };
    // ln(beta2) near 0 loses the digits that beta2 has before it: 1e-16 / 2e-6.
    EXPECT_NEAR(half_life(scaled.adam->beta2, 1) / half_life(0.999, 512), 1, 1e-9);
    EXPECT_EQ(scaled.learning_rate, 1e-3);
    EXPECT_EQ(scaled.adam->beta1, 0.9);
    EXPECT_EQ(scaled.adam->epsilon, 1e-8);
}

TEST(RateRule, AtTheReferenceBatchNothingChanges) {
    for (const RateRule rule : all_rules) {
        const RateConstants scaled = scale_to_batch(adam(), rule, 48, 48);
        EXPECT_EQ(scaled.learning_rate, 1e-3);
        // 1 - (1 - beta) is beta to a rounding.
        EXPECT_DOUBLE_EQ(scaled.adam->beta1, 0.9);
        EXPECT_DOUBLE_EQ(scaled.adam->beta2, 0.999);
        EXPECT_EQ(scaled.adam->epsilon, 1e-8);
    }
}

TEST(RateRule, ThereAndBackIsWhereItWas) {
    std::mt19937_64 random(1);
    std::uniform_int_distribution<std::int64_t> batch(1, 1000);
    for (int i = 0; i < 1000; ++i) {
        // k (1 - beta1) below 1: at most ten times as many.
        const std::int64_t from = batch(random), to = std::min(batch(random), 9 * from);
        for (const RateRule rule : all_rules) {
            const RateConstants there = scale_to_batch(adam(), rule, from, to),
                                back = scale_to_batch(there, rule, to, from);
            EXPECT_NEAR(back.learning_rate / 1e-3, 1, 1e-12);
            EXPECT_NEAR(back.adam->beta1, 0.9, 1e-12);
            // beta2^(1/1000) is known to 1e-16, its 1000th power to 1e-13.
            EXPECT_NEAR(back.adam->beta2, 0.999, 1e-12);
            EXPECT_NEAR(back.adam->epsilon / 1e-8, 1, 1e-12);
        }
    }
}

TEST(RateRule, SaysWhereAdamsEquationEnds) {
    EXPECT_NO_THROW(scale_to_batch(adam(), RateRule::adam_sde, 100, 999));
    expect_usage_error({"adam-sde has no beta1", "10 times the reference", "Use a batch below 10 times", "sqrt"},
                       [] { scale_to_batch(adam(), RateRule::adam_sde, 100, 1000); });
    RateConstants fast = adam();
    fast.adam->beta1 = 0.99;
    fast.adam->beta2 = 0.8;
    expect_usage_error({"adam-sde has no beta2"}, [&] { scale_to_batch(fast, RateRule::adam_sde, 1, 6); });
}

TEST(RateRule, RefusesWhatHasNoAnswer) {
    expect_usage_error({"the reference batch is 0"}, [] { scale_to_batch(adam(), RateRule::linear, 0, 8); });
    expect_usage_error({"the batch is -3"}, [] { scale_to_batch(adam(), RateRule::none, 8, -3); });
    for (const RateRule rule : {RateRule::adam_sde, RateRule::beta2_time}) {
        expect_usage_error({"changes Adam's constants", "linear or sqrt"},
                           [rule] { scale_to_batch({.learning_rate = 0.1}, rule, 8, 16); });
    }
    for (const double rate : {std::nan(""), std::numeric_limits<double>::infinity(), 1e308}) {
        expect_usage_error({"learning rate of"}, [rate] { scale_to_batch(adam(rate), RateRule::linear, 1, 1000); });
    }
}

TEST(RateRule, RefusesABetaThatAveragesNothing) {
    expect_usage_error({"beta of 1", "check both batches"},
                       [] { scale_to_batch(adam(), RateRule::adam_sde, std::int64_t{1} << 60, 1); });
    expect_usage_error({"beta of 0"}, [] { scale_to_batch(adam(), RateRule::beta2_time, 1, 10'000'000); });
}

TEST(RateRule, SaysWhatItDid) {
    const RateConstants sde = scale_to_batch(adam(), RateRule::adam_sde, 64, 256);
    EXPECT_EQ(
        describe_scaling(adam(), sde, RateRule::adam_sde, 64, 256),
        "rate 0.001 at batch 64 is 0.002 at 256 (adam-sde), beta1 0.9 is 0.6, beta2 0.999 is 0.996, epsilon 1e-08 "
        "is 5e-09");
    EXPECT_EQ(describe_scaling({.learning_rate = 0.1}, {.learning_rate = 0.8}, RateRule::linear, 32, 256),
              "rate 0.1 at batch 32 is 0.8 at 256 (linear)");
}

}  // namespace
}  // namespace microbatch
