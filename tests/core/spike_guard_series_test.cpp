// Runs of many kinds: quiet ones raise no alarm; those that climb are stopped, whenever the climb begins.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "microbatch/core/spike_guard.h"
#include "microbatch/core/str_cat.h"
#include "support/guarding.h"

namespace microbatch {
namespace {

using namespace test;

/// Loss and gradient norm of a step, from 0, of runs in which nothing goes wrong.
using Series = std::function<std::pair<double, double>(int, Noise&)>;

/// The share of steps that are refused, over so many runs of 1,000 steps. None diverges.
double alarms_a_step(const Series& series, int runs) {
    int alarms = 0, steps = 0;
    for (int seed = 1; seed <= runs; ++seed) {
        SpikeGuard guard;
        Noise noise(seed);
        Verdict verdict = Verdict::apply;
        for (int i = 0; i < 1000 && verdict != Verdict::diverged; ++i, ++steps) {
            const auto [loss, norm] = series(i, noise);
            verdict = judge(guard, loss, norm).verdict;
            alarms += verdict == Verdict::apply ? 0 : 1;
        }
        EXPECT_NE(verdict, Verdict::diverged) << "seed " << seed;
    }
    return static_cast<double>(alarms) / steps;
}

TEST(SpikeGuardSeries, RaisesNoAlarmInQuietRunsOfAnyKind) {
    const std::map<std::string, Series> kinds{
        {"no progress", [](int, Noise& n) { return std::pair(2.3 * std::exp(0.1 * n()), std::exp(0.3 * n())); }},
        {"small batches", [](int, Noise& n) { return std::pair(2.3 * std::exp(0.5 * n()), std::exp(0.7 * n())); }},
        {"a random walk down",
         [walk = 0.0](int i, Noise& n) mutable {
             walk = (i == 0 ? 0.0 : walk) - 0.002 + 0.01 * n();
             return std::pair(2.3 * std::exp(walk + 0.05 * n()), std::exp(0.3 * n()));
         }},
        {"a fall to a fifth in ten steps",
         [](int i, Noise& n) {
             const double fall = std::pow(0.2, std::clamp((i - 100) / 10.0, 0.0, 1.0));
             return std::pair(2.3 * fall * std::exp(0.05 * n()), std::exp(0.3 * n()));
         }},
        {"a fall to a fifth in the first ten steps",
         [](int i, Noise& n) {
             return std::pair(2.3 * std::pow(0.2, std::min(i / 10.0, 1.0)) * std::exp(0.05 * n()), std::exp(0.3 * n()));
         }},
        {"a warmup, then a fall",
         [](int i, Noise& n) {
             const double loss = i < 200 ? 1.0 : 0.3 + 0.7 * std::exp(-(i - 200) / 60.0);
             return std::pair(2.3 * loss * std::exp(0.06 * n()),
                              (i < 200 ? 0.3 + i / 100.0 : 2.0) * std::exp(0.3 * n()));
         }},
        {"an overshoot to three times the first loss",
         [](int i, Noise& n) {
             const double loss = (1.0 + 2.0 * std::exp(-(i - 6) * (i - 6) / 8.0)) * std::exp(-i / 300.0);
             return std::pair(2.3 * loss * std::exp(0.05 * n()), std::exp(0.3 * n()));
         }},
        {"a large batch whose loss swings",
         [](int i, Noise& n) {
             const double loss = 2.3 * std::exp(-i / 400.0) * (1.0 + 0.03 * std::max(0.0, std::sin(i / 9.0)));
             return std::pair(loss + 0.0005 * n(), 1.0 + 0.5 * std::sin(i / 9.0) + 0.01 * n());
         }},
        {"a gradient that grows as the loss falls",
         [](int i, Noise& n) {
             return std::pair(0.1 + 2.2 * std::exp(-i / 200.0 + 0.05 * n()), 0.1 * std::exp(i / 300.0 + 0.5 * n()));
         }},
        {"losses below 0", [](int i, Noise& n) { return std::pair(1.4 - 0.02 * i + 0.1 * n(), std::exp(0.3 * n())); }},
    };
    for (const auto& [kind, series] : kinds) EXPECT_EQ(alarms_a_step(series, 10), 0.0) << kind;
}

TEST(SpikeGuardSeries, SeldomRefusesAStepOfARunWithLongTails) {
    const auto student = [](Noise& n, int freedom) {
        double squares = 0.0;
        for (int i = 0; i < freedom; ++i) squares += std::pow(n(), 2);
        return n() / std::sqrt(squares / freedom);
    };
    const auto of_student = [&](int freedom) {
        return [=](int, Noise& n) {
            const double loss = student(n, freedom), norm = student(n, freedom);
            return std::pair(2.3 * std::exp(0.1 * loss), std::exp(0.3 * norm));
        };
    };
    EXPECT_LE(alarms_a_step(of_student(5), 20), 2e-3);
    EXPECT_LE(alarms_a_step(of_student(3), 20), 5e-3);
    // A model that knows its data by heart, but for one batch in ten.
    const auto by_heart = [](int i, Noise& n) {
        const bool hard = n() > std::min(-2.0 + i / 100.0, 1.28);
        const double loss = hard ? std::exp(-0.5 + 0.8 * n()) : std::exp(-6.0 + 1.5 * n());
        return std::pair(loss, 3.0 * std::sqrt(loss) * std::exp(0.3 * n()));
    };
    EXPECT_LE(alarms_a_step(by_heart, 20), 1e-3);
    // Squared errors of four samples.
    const auto regression = [](int i, Noise& n) {
        const double loss = 0.25 * (std::pow(n(), 2) + std::pow(n(), 2) + std::pow(n(), 2) + std::pow(n(), 2));
        return std::pair(loss * std::exp(-i / 700.0), std::sqrt(loss) * std::exp(0.3 * n()));
    };
    EXPECT_LE(alarms_a_step(regression, 20), 1e-3);
}

TEST(SpikeGuardSeries, StopsAClimbWheneverItBeginsAndHoweverFastItIs) {
    // Every step that is applied raises the loss by a factor: from the start, within the first 64 steps, or later.
    for (const int quiet : {0, 1, 3, 10, 40, 300}) {
        for (const double growth : {0.01, 0.03, 0.1, 0.3, 1.0}) {
            SpikeGuard guard;
            Noise noise(1);
            int applied = 0;
            const auto climbed = [&] { return growth * std::max(0, applied - quiet); };
            for (Verdict verdict = Verdict::apply; verdict != Verdict::diverged && climbed() < 20.0;) {
                verdict = judge(guard, 2.3 * std::exp(climbed() + 0.1 * noise()), std::exp(0.3 * noise())).verdict;
                applied += verdict == Verdict::apply ? 1 : 0;
            }
            const std::string climb = str_cat("by ", growth, " a step from step ", quiet);
            if (quiet >= 64) {
                EXPECT_LE(climbed(), 1.2) << climb;
            } else if (growth < 0.1) {
                EXPECT_LE(climbed(), 3.0) << climb;
            } else {
                EXPECT_LT(applied, 64) << climb;
            }
        }
    }
}

// ResNet on Fashion-MNIST at far too large a rate: `train --model resnet --batch 32 --lr 60 --warmup "80 steps" --seed
// 5`.
TEST(SpikeGuardSeries, AFirstUpdateThatIsFarTooLargeIsSeenInTheNextLoss) {
    SpikeGuard guard;
    EXPECT_EQ(judge(guard, 2.36, 1.84).verdict, Verdict::apply);
    for (const double loss : {42.4, 39.1, 47.6, 44.0, 51.3, 38.8, 40.5, 45.2, 43.6}) {
        EXPECT_EQ(judge(guard, loss, 8.81).verdict, Verdict::refuse);
    }
    EXPECT_EQ(judge(guard, 42.4, 8.81).verdict, Verdict::diverged);
}

// An MLP without clipping, at a constant rate of 0.3 with momentum 0.9: losses and gradient norms as they were.
TEST(SpikeGuardSeries, AClimbWithinTheFirstStepsDoesNotBecomeUsual) {
    const std::vector<std::pair<double, double>> climb{
        {2.33, 1.6},  {2.19, 1.46}, {1.95, 2},    {2.17, 5.67}, {4.14, 10.3}, {3.39, 6.51},
        {1.48, 2.37}, {1.75, 5.97}, {6.29, 10.4}, {3, 6.28},    {2.39, 4.19}, {1.76, 5.44},
        {2.7, 7.08},  {11.2, 26.9}, {5.47, 11.9}, {17.9, 39.2}, {100, 138},   {1.34e3, 1.04e3}};
    SpikeGuard guard;
    double largest = 0.0;
    for (const auto& [loss, norm] : climb) {
        if (judge(guard, loss, norm).verdict == Verdict::apply) largest = std::max(largest, loss);
    }
    EXPECT_LE(largest, 100.0);
    EXPECT_EQ(judge(guard, 3.77e3, 2.51e3).verdict, Verdict::refuse);
}

TEST(EndsWorse, IsSaidOfARunWhoseLastLossesAreAboveItsFirst) {
    Noise noise(1);
    std::vector<double> losses;
    for (int i = 0; i < 100; ++i) losses.push_back(2.3 * std::exp(0.03 * noise()));
    EXPECT_FALSE(ends_worse(losses));
    for (int i = 0; i < 16; ++i) losses.push_back(2.9);
    EXPECT_TRUE(ends_worse(losses));
    // Some large losses on the way to the end are no end.
    for (int i = 0; i < 9; ++i) losses.push_back(2.2);
    EXPECT_FALSE(ends_worse(losses));
}

TEST(EndsWorse, IsSaidWhenTheFirstLossesWereAlreadyThoseOfAClimb) {
    std::vector<double> losses{2.36, 42.4, 14.7, 90.0};
    losses.resize(100, 9.0);
    EXPECT_TRUE(ends_worse(losses));
}

TEST(EndsWorse, TakesMoreThanNoiseToSayItOfAShortRun) {
    EXPECT_FALSE(ends_worse({}));
    EXPECT_FALSE(ends_worse({2.3}));
    EXPECT_FALSE(ends_worse({2.3, 9.0}));
    EXPECT_TRUE(ends_worse({2.3, 24.0}));
    EXPECT_FALSE(ends_worse({2.3, 2.2, 2.4, 2.3, 3.1, 2.9, 3.3, 4.5}));
    EXPECT_TRUE(ends_worse({2.3, 2.2, 2.4, 2.3, 5.1, 4.9, 5.3, 6.5}));
}

TEST(EndsWorse, IsNotSaidOfRunsThatMakeNoProgress) {
    for (const int steps : {2, 8, 20, 40, 200}) {
        for (const double deviation : {0.03, 0.1, 0.3}) {
            int said = 0;
            for (std::uint64_t seed = 1; seed <= 1000; ++seed) {
                Noise noise(seed);
                std::vector<double> losses;
                for (int i = 0; i < steps; ++i) losses.push_back(std::exp(deviation * noise()));
                said += ends_worse(losses) ? 1 : 0;
            }
            EXPECT_LE(said, 1) << steps << " steps with a deviation of " << deviation;
        }
    }
}

TEST(EndsWorse, IsSaidOfALossOnOtherDataThatIsWorse) {
    const std::vector<double> losses(100, 2.3);
    EXPECT_FALSE(ends_worse(losses, 1.2));
    EXPECT_FALSE(ends_worse(losses, 2.4));
    EXPECT_TRUE(ends_worse(losses, 2.6));
    EXPECT_TRUE(ends_worse(losses, std::nan("")));
}

TEST(EndsWorse, KnowsLossesBelowZero) {
    EXPECT_FALSE(ends_worse({-1.0, -2.0, -3.0, -4.0}));
    EXPECT_TRUE(ends_worse({-1.0, -1.0, 9.5, 9.5}));
}

}  // namespace
}  // namespace microbatch
