// Traces of losses and gradient norms shaped like those of large runs, and the decisions of the guard.
#include "microbatch/core/spike_guard.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "support/errors.h"
#include "support/guarding.h"

namespace microbatch {
namespace {

using namespace test;

constexpr double nan_value = std::numeric_limits<double>::quiet_NaN();
constexpr double infinity = std::numeric_limits<double>::infinity();

/// A run whose loss falls from 5 towards 3, noisy, with gradient norms that vary by factors.
class Trace {
public:
    explicit Trace(std::uint64_t seed = 1, const SpikeGuardOptions& options = {}) : guard_(options), random_(seed) {}

    /// The next step: what is usual now, times these factors.
    Verdict step(double of_loss = 1.0, double of_norm = 1.0) {
        const double loss = 3.0 + 2.0 * std::exp(-steps_ / 300.0) + 0.05 * normal_(random_);
        const double norm = 0.8 * std::exp(0.3 * normal_(random_));
        ++steps_;
        judgement_ = judge(guard_, loss * of_loss, norm * of_norm);
        return judgement_.verdict;
    }

    Trace& quiet(int steps) {
        for (int i = 0; i < steps; ++i) EXPECT_EQ(step(), Verdict::apply) << "step " << steps_ << reason();
        return *this;
    }

    const std::string& reason() const { return judgement_.reason; }
    SpikeGuard& guard() { return guard_; }

private:
    SpikeGuard guard_;
    std::mt19937_64 random_;
    std::normal_distribution<double> normal_;
    double steps_ = 0;
    Judgement judgement_;
};

TEST(SpikeGuard, AppliesEveryStepOfAQuietRun) {
    for (std::uint64_t seed = 1; seed <= 50; ++seed) Trace(seed).quiet(2000);
}

TEST(SpikeGuard, RefusesOneSharpStepAndNoOther) {
    for (std::uint64_t seed = 1; seed <= 50; ++seed) {
        Trace trace(seed);
        trace.quiet(300);
        EXPECT_EQ(trace.step(1.5), Verdict::refuse);
        EXPECT_NE(trace.reason().find("loss of "), std::string::npos);
        trace.quiet(300);
    }
}

TEST(SpikeGuard, FiresByTheSecondStepOfASpikeStaysShutAndReopens) {
    // The loss rises by a fifth over five steps while the gradient norm grows a thousandfold, and calms down again.
    for (std::uint64_t seed = 1; seed <= 50; ++seed) {
        Trace trace(seed);
        trace.quiet(400);
        int applied = 0;
        for (int i = 1; i <= 5; ++i) {
            const Verdict verdict = trace.step(1.0 + 0.04 * i, std::pow(1000.0, i / 5.0));
            if (verdict == Verdict::apply) ++applied;
            if (i >= 2) {
                EXPECT_EQ(verdict, Verdict::refuse) << "step " << i << " of the spike, seed " << seed;
            }
        }
        EXPECT_LE(applied, 1);
        trace.quiet(200);
    }
}

TEST(SpikeGuard, SeesTwoSpikesWithACalmBetween) {
    for (std::uint64_t seed = 1; seed <= 50; ++seed) {
        Trace trace(seed);
        trace.quiet(200);
        for (int spike = 0; spike < 2; ++spike) {
            for (int i = 0; i < 4; ++i) EXPECT_EQ(trace.step(1.3, 50.0), Verdict::refuse);
            trace.quiet(20);
        }
    }
}

TEST(SpikeGuard, CallsASlowClimbDivergence) {
    for (const double a_step : {1.0005, 1.001, 1.003, 1.01}) {
        Trace trace;
        trace.quiet(1500);
        double factor = 1.0;
        int steps = 0;
        Verdict verdict = Verdict::apply;
        while (verdict != Verdict::diverged && steps < 2000) {
            verdict = trace.step(factor *= a_step);
            ++steps;
        }
        EXPECT_EQ(verdict, Verdict::diverged) << a_step;
        EXPECT_LT(factor, 1.35) << a_step;  // before a third of the loss is lost
    }
}

TEST(SpikeGuard, CallsASpikeThatDoesNotEndDivergence) {
    Trace trace;
    trace.quiet(200);
    for (int i = 0; i < 9; ++i) EXPECT_EQ(trace.step(2.0), Verdict::refuse);
    EXPECT_EQ(trace.step(2.0), Verdict::diverged);
    EXPECT_EQ(trace.guard().refused_in_a_row(), 10);
    EXPECT_EQ(trace.step(2.0), Verdict::diverged);  // and does not forget it
    EXPECT_EQ(trace.step(), Verdict::apply);
    EXPECT_EQ(trace.guard().refused_in_a_row(), 0);
}

TEST(SpikeGuard, RefusesWhatIsNotFiniteFromTheFirstStepOn) {
    Trace trace;
    for (const double bad : {nan_value, infinity, -infinity}) {
        EXPECT_EQ(trace.step(bad), Verdict::refuse);
        EXPECT_EQ(trace.reason(), "loss is not finite");
        EXPECT_EQ(trace.step(1.0, bad), Verdict::refuse);
        EXPECT_EQ(trace.reason(), "gradient norm is not finite");
    }
    trace.quiet(200);
}

TEST(SpikeGuard, IsNotSwitchedOffByNan) {
    Trace trace;
    trace.quiet(200);
    for (int round = 0; round < 50; ++round) {
        EXPECT_EQ(trace.step(nan_value, nan_value), Verdict::refuse);
        EXPECT_EQ(trace.step(3.0), Verdict::refuse);
        trace.quiet(1);
    }
}

TEST(SpikeGuard, LeavesRoomToTheFirstLossesAndDoesNotJudgeTheFirstNorms) {
    Trace trace;
    for (int i = 0; i < 63; ++i) {
        EXPECT_EQ(trace.step(1.0 + 0.25 * (i % 5), i % 3 == 0 ? 1.0 : 100.0), Verdict::apply) << i;
    }
}

TEST(SpikeGuard, WhatIsRefusedDoesNotChangeWhatIsUsual) {
    Trace with, without;
    with.quiet(150);
    without.quiet(150);
    for (int i = 0; i < 8; ++i) judge(with.guard(), 1000.0, 1.0);
    for (const double loss : {3.9, 4.2, 4.5, 4.7, 4.8, 4.9, 5.0, 5.2, 6.0}) {
        SpikeGuard one = with.guard(), other = without.guard();
        EXPECT_EQ(judge(one, loss, 1.0).verdict == Verdict::apply, judge(other, loss, 1.0).verdict == Verdict::apply)
            << loss;
    }
}

TEST(SpikeGuard, LossesThatAreAllTheSameLeaveRoomForARounding) {
    SpikeGuard guard;
    for (int i = 0; i < 200; ++i) EXPECT_EQ(judge(guard, 2.0, 1.0).verdict, Verdict::apply);
    EXPECT_EQ(judge(guard, 2.001, 1.001).verdict, Verdict::apply);
    EXPECT_EQ(judge(guard, 2.1, 1.0).verdict, Verdict::refuse);
    EXPECT_EQ(judge(guard, 2.0, 1.1).verdict, Verdict::refuse);
}

TEST(SpikeGuard, LossesNearZeroLeaveRoomForWhatIsSmallAgainstTheFirst) {
    SpikeGuard guard;
    std::mt19937_64 random(1);
    std::normal_distribution<double> normal;
    for (int i = 0; i < 1000; ++i) {
        // Down to a millionth, with bumps of a hundred times that.
        const double loss = 5.0 * std::exp(-i / 40.0) + 1e-6 * (i % 100 == 99 ? 100.0 : 1.0 + 0.1 * normal(random));
        EXPECT_EQ(judge(guard, loss, 1e-3 * std::exp(0.3 * normal(random))).verdict, Verdict::apply) << i;
    }
    EXPECT_EQ(judge(guard, 0.5, 1e-3).verdict, Verdict::refuse);
}

TEST(SpikeGuard, WhatIsDivergedStaysSoUntilOneRollsBackToACopy) {
    Trace trace;
    trace.quiet(1500);
    const SpikeGuard before = trace.guard();
    double factor = 1.0;
    while (trace.step(factor *= 1.003) != Verdict::diverged) ASSERT_LT(factor, 2.0);
    const std::int64_t refused = trace.guard().refused_in_a_row();
    EXPECT_EQ(refused, 1);
    EXPECT_EQ(trace.step(factor), Verdict::diverged);
    EXPECT_EQ(trace.guard().refused_in_a_row(), 2);
    trace.guard() = before;
    trace.quiet(100);
}

TEST(SpikeGuard, TakesGradientsOfZeros) {
    SpikeGuard guard;
    for (int i = 0; i < 300; ++i) EXPECT_EQ(judge(guard, 1.0, 0.0).verdict, Verdict::apply);
}

TEST(SpikeGuard, ACopyContinuesFromWhereItWasMade) {
    Trace trace;
    trace.quiet(200);
    SpikeGuard copy = trace.guard();
    for (int i = 0; i < 9; ++i) trace.step(3.0);
    EXPECT_EQ(trace.guard().refused_in_a_row(), 9);
    EXPECT_EQ(copy.refused_in_a_row(), 0);
    EXPECT_EQ(judge(copy, 9.0, 1.0).verdict, Verdict::refuse);
}

TEST(SpikeGuard, EvaluatingChangesNothing) {
    Trace trace;
    for (int i = 0; i < 400; ++i) {
        const SpikeGuardState before = trace.guard().state();
        for (const double loss : {3.0, 100.0, nan_value}) trace.guard().evaluate(loss, 1.0);
        ASSERT_EQ(trace.guard().state(), before) << "step " << i;
        trace.step(i % 50 == 49 ? 3.0 : 1.0);
    }
}

TEST(SpikeGuard, RefusesSettingsThatHaveNoMeaning) {
    expect_usage_error({"least is 1"}, [] { SpikeGuard({.least = 1}); });
    expect_usage_error({"window of 10 steps is shorter than the required 64"}, [] { SpikeGuard({.window = 10}); });
    for (const double sigmas : {0.0, -1.0, nan_value, infinity}) {
        expect_usage_error({"sigmas is"}, [sigmas] { SpikeGuard({.sigmas = sigmas}); });
    }
    expect_usage_error({"most_refused is 0"}, [] { SpikeGuard({.most_refused = 0}); });
}

TEST(SpikeGuard, IsCalmWhileTheLossIsNearItsLowest) {
    SpikeGuard guard;
    EXPECT_TRUE(guard.is_calm());
    // At the start: not above where it began.
    for (const auto& [loss, calm] : {std::pair{5.0, true}, {4.9, true}, {5.1, false}, {4.8, true}}) {
        judge(guard, loss, 1.0);
        EXPECT_EQ(guard.is_calm(), calm) << loss;
    }
    Trace trace;
    for (int i = 0; i < 500; ++i) {
        trace.step();
        if (i >= 64) {
            EXPECT_TRUE(trace.guard().is_calm()) << i;
        }
    }
    EXPECT_NE(trace.step(10.0), Verdict::apply);
    EXPECT_FALSE(trace.guard().is_calm());
    EXPECT_EQ(trace.step(), Verdict::apply);
    EXPECT_TRUE(trace.guard().is_calm());
    // Up by a thousandth a step: long before it is called divergence it is not calm.
    int calm = 0, steps = 0;
    while (trace.step(1.0 + 0.001 * ++steps) == Verdict::apply) calm += trace.guard().is_calm() ? 1 : 0;
    EXPECT_LT(calm, 4 * steps / 5);
    EXPECT_FALSE(trace.guard().is_calm());
}

TEST(SpikeGuard, ContinuesFromItsStateToTheSameVerdicts) {
    for (std::uint64_t seed = 1; seed <= 20; ++seed) {
        const SpikeGuardOptions options{.window = 40, .least = 20, .most_refused = 4};
        Trace trace(seed, options), twin(seed, options);
        int refused = 0;
        for (int i = 0; i < 400; ++i) {
            // Now and then up to eight bad steps in a row, so that verdicts of every kind are among them.
            const double of_loss = i % 50 > 41 && i % 50 < 42 + i / 50 ? 3.0 : i % 37 == 30 ? nan_value : 1.0;
            SpikeGuard fresh(options);
            judge(fresh, 1e6, 1e6);
            fresh.restore(trace.guard().state());
            trace.guard() = fresh;
            EXPECT_EQ(trace.guard().is_calm(), twin.guard().is_calm());
            EXPECT_EQ(trace.guard().refused_in_a_row(), twin.guard().refused_in_a_row());
            const Verdict verdict = trace.step(of_loss);
            ASSERT_EQ(verdict, twin.step(of_loss));
            EXPECT_EQ(trace.reason(), twin.reason());
            EXPECT_EQ(trace.guard().state(), twin.guard().state());
            refused += verdict != Verdict::apply ? 1 : 0;
        }
        EXPECT_GT(refused, 15);
    }
}

TEST(SpikeGuard, AStateOfALargerWindowIsThatOfItsLastSteps) {
    Trace trace(1, {.window = 64, .least = 20});
    trace.quiet(100);
    SpikeGuard smaller({.window = 30, .least = 20});
    smaller.restore(trace.guard().state());
    ASSERT_EQ(smaller.state().accepted.size(), 30u);
    EXPECT_EQ(smaller.state().accepted.front(), trace.guard().state().accepted[34]);
    EXPECT_EQ(smaller.state().accepted.back(), trace.guard().state().accepted.back());
}

TEST(SpikeGuard, RefusesAStateThatNoneCouldHaveAndKeepsItsOwn) {
    Trace trace;
    trace.quiet(100);
    const SpikeGuardState good = trace.guard().state();
    const auto refused = [&](const std::function<void(SpikeGuardState&)>& change) {
        SpikeGuardState state = good;
        change(state);
        expect_usage_error({"spike guard"}, [&] { trace.guard().restore(state); });
        EXPECT_EQ(trace.guard().state(), good);
    };
    refused([](SpikeGuardState& state) { state.refused_in_a_row = -1; });
    for (const double bad : {nan_value, infinity, -infinity}) {
        refused([bad](SpikeGuardState& state) { state.accepted[50].loss = bad; });
        refused([bad](SpikeGuardState& state) { state.accepted[50].gradient_norm = bad; });
        refused([bad](SpikeGuardState& state) { state.bounds->diverged = bad; });
        refused([bad](SpikeGuardState& state) { state.bounds->calm = bad; });
        refused([bad](SpikeGuardState& state) { state.scale = bad; });
    }
}

}  // namespace
}  // namespace microbatch
