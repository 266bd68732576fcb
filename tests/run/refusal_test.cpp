// Whatever goes wrong in a batch, it does not affect the next one.
#include <c10/util/Exception.h>

#include <functional>
#include <limits>
#include <string>

#include "microbatch/optim/adamw.h"
#include "microbatch/step/accumulator.h"
#include "support/errors.h"
#include "support/gradients.h"
#include "support/models.h"

namespace microbatch {
namespace {

using namespace test;

constexpr std::int64_t micro_batches = 5;  // 17 samples in 4, 4, 4, 3 and 2
const double nan = std::numeric_limits<double>::quiet_NaN();
const double infinity = std::numeric_limits<double>::infinity();

/// A model in training. The same calls give the same bits, in moments of AdamW too.
struct Training {
    std::shared_ptr<TanhMlp> model = make_mlp(1);
    Parameters parameters = parameters_of(model);
    AdamW optimizer{split_by_decay(parameters, 0.1), {.learning_rate = 1e-2}};
    Accumulator accumulator{parameters, optimizer, {.plan = {4}, .clip_norm = 1.0}};
    LossFunction loss = weighted_squares(model);

    StepReport step(std::uint64_t seed) { return accumulator.step(regression_batch(17, seed), loss); }
    Named values() const { return values_of(parameters); }
};

/// What a fault makes of the loss of the micro-batch it strikes.
using Fault = std::function<WeightedLoss(WeightedLoss)>;

LossFunction strike(const LossFunction& loss, std::int64_t position, const Fault& fault) {
    return [loss, position, fault, index = std::int64_t{0}](const Batch& micro) mutable {
        const WeightedLoss good = loss(micro);
        return index++ == position ? fault(good) : good;
    };
}

/// One good step, one bad batch in `bad`, two good steps: the bits of three good steps.
void expect_no_trace(const std::function<void(Training&)>& bad) {
    Training hurt, healthy;
    hurt.step(1);
    healthy.step(1);
    const Named before = hurt.values();
    bad(hurt);
    expect_no_gradients(hurt.parameters);
    expect_same_bits(hurt.values(), before);
    for (std::uint64_t seed : {2, 3}) {
        const StepReport report = hurt.step(seed), wanted = healthy.step(seed);
        EXPECT_TRUE(report.applied);
        EXPECT_EQ(report.loss, wanted.loss);
        EXPECT_EQ(report.gradient_norm, wanted.gradient_norm);
    }
    expect_same_bits(hurt.values(), healthy.values());
}

void expect_refused(const Fault& fault, std::string_view reason) {
    for (std::int64_t position = 0; position < micro_batches; ++position) {
        SCOPED_TRACE(testing::Message() << reason << " in micro-batch " << position);
        expect_no_trace([&](Training& run) {
            const StepReport report = run.accumulator.step(regression_batch(17, 9), strike(run.loss, position, fault));
            EXPECT_FALSE(report.applied);
            EXPECT_EQ(report.reason, reason);
            EXPECT_EQ(report.micro_batches, micro_batches);
        });
    }
}

/// Runs a batch whose fault throws `Thrown`, in every position, whole and streamed.
template <class Thrown>
void expect_thrown(const Fault& fault) {
    for (std::int64_t position = 0; position < micro_batches; ++position) {
        SCOPED_TRACE(testing::Message() << "thrown in micro-batch " << position);
        expect_no_trace([&](Training& run) {
            EXPECT_THROW(run.accumulator.step(regression_batch(17, 9), strike(run.loss, position, fault)), Thrown);
        });
        expect_no_trace([&](Training& run) {
            EXPECT_THROW(run.accumulator.gather(regression_batch(17, 9), strike(run.loss, position, fault)), Thrown);
            expect_usage_error({}, [&] { run.accumulator.apply(); });
        });
    }
}

TEST(Refusal, ALossFunctionThatThrowsLeavesNoTrace) {
    expect_thrown<std::runtime_error>([](WeightedLoss) -> WeightedLoss { throw std::runtime_error("no data"); });
    expect_thrown<std::bad_alloc>([](WeightedLoss) -> WeightedLoss { throw std::bad_alloc(); });
    expect_thrown<int>([](WeightedLoss) -> WeightedLoss { throw 42; });
}

TEST(Refusal, AnOperatorThatThrowsLeavesNoTrace) {
    expect_thrown<c10::Error>([](WeightedLoss good) -> WeightedLoss {
        return {at::matmul(good.sum.view({1, 1}), at::ones({2, 2}, at::kDouble)).sum(), good.weight};
    });
}

TEST(Refusal, TheErrorOfTheLossFunctionPassesThrough) {
    Training run;
    try {
        run.accumulator.step(regression_batch(17, 9),
                             [](const Batch&) -> WeightedLoss { throw std::runtime_error("my file is gone"); });
        FAIL();
    } catch (const std::runtime_error& error) {
        EXPECT_STREQ(error.what(), "my file is gone");
    }
}

/// A backward that breaks off half way: the second layer's gradients are there already, the first's are not.
template <class Thrown>
void expect_backward_thrown(const std::function<void()>& raise) {
    for (std::int64_t position = 0; position < micro_batches; ++position) {
        SCOPED_TRACE(testing::Message() << "thrown in the backward of micro-batch " << position);
        expect_no_trace([&](Training& run) {
            std::int64_t index = 0;
            const auto loss = [&](const Batch& micro) -> WeightedLoss {
                const at::Tensor hidden = at::tanh(run.model->first->forward(micro.fields[0]));
                if (index++ == position) hidden.register_hook([&](const at::Tensor&) { raise(); });
                const at::Tensor squares = (run.model->second->forward(hidden) - micro.fields[1]).square().sum(1);
                return {(squares * micro.fields[2]).sum(), micro.fields[2].sum().item<double>()};
            };
            EXPECT_THROW(run.accumulator.step(regression_batch(17, 9), loss), Thrown);
        });
    }
}

TEST(Refusal, ABackwardThatThrowsLeavesNoTrace) {
    expect_backward_thrown<c10::Error>([] { TORCH_CHECK(false, "kernel failed"); });
    expect_backward_thrown<std::runtime_error>([] { throw std::runtime_error("hook failed"); });
}

TEST(Refusal, RefusesALossThatIsNotFinite) {
    for (double bad : {nan, infinity, -infinity}) {
        // Added, so that the gradient stays finite: the loss alone must be enough to refuse.
        expect_refused(
            [bad](WeightedLoss good) -> WeightedLoss {
                return {good.sum + bad, good.weight};
            },
            "loss is not finite");
    }
}

TEST(Refusal, RefusesALossOfOppositeInfinities) {
    expect_no_trace([](Training& run) {
        const auto minus = strike(run.loss, 3, [](WeightedLoss g) -> WeightedLoss {
            return {g.sum - infinity, g.weight};
        });
        const auto both = strike(minus, 0, [](WeightedLoss g) -> WeightedLoss { return {g.sum + infinity, g.weight}; });
        EXPECT_EQ(run.accumulator.step(regression_batch(17, 9), both).reason, "loss is not finite");
    });
}

TEST(Refusal, RefusesAGradientThatIsNotFiniteUnderAFiniteLoss) {
    // d sqrt(0 * s) / ds = infinity * 0 = NaN, and the value is 0: the classic.
    expect_refused(
        [](WeightedLoss good) -> WeightedLoss {
            return {good.sum + (good.sum * 0).sqrt(), good.weight};
        },
        "gradient norm is not finite");
    for (double bad : {infinity, -infinity}) {
        expect_refused(
            [bad](WeightedLoss good) -> WeightedLoss {
                const at::Tensor sum = good.sum * 1;
                sum.register_hook([bad](const at::Tensor& gradient) { return gradient * bad; });
                return {sum, good.weight};
            },
            "gradient norm is not finite");
    }
}

TEST(Refusal, ABatchThatAGateRefusesOrThrowsOnLeavesNothing) {
    expect_no_trace([](Training& run) {
        FunctionGate gate([](const Gathered&) -> std::string { return "not today"; });
        const StepReport report = run.accumulator.step(regression_batch(17, 9), run.loss, {.gate = &gate});
        EXPECT_FALSE(report.applied);
        EXPECT_EQ(report.reason, "not today");
    });
    expect_no_trace([](Training& run) {
        FunctionGate fails([](const Gathered&) -> std::string { throw std::runtime_error("no gate"); });
        EXPECT_THROW(run.accumulator.step(regression_batch(17, 9), run.loss, {.gate = &fails}), std::runtime_error);
    });
}

TEST(Refusal, AGateIsAskedOnceForEveryBatchThatHasWeight) {
    Training run;
    int asked = 0;
    FunctionGate gate([&](const Gathered& gathered) -> std::string {
        ++asked;
        EXPECT_GT(gathered.weight, 0);
        return {};
    });
    EXPECT_TRUE(run.accumulator.step(regression_batch(17, 9), run.loss, {.gate = &gate}).applied);
    EXPECT_EQ(asked, 1);
    const auto nothing = [&](const Batch& micro) -> WeightedLoss { return {run.loss(micro).sum, 0}; };
    EXPECT_FALSE(run.accumulator.step(regression_batch(17, 9), nothing, {.gate = &gate}).applied);
    EXPECT_EQ(asked, 1);
    const auto broken = [&](const Batch& micro) -> WeightedLoss { return {run.loss(micro).sum * nan, 1}; };
    EXPECT_EQ(run.accumulator.step(regression_batch(17, 9), broken, {.gate = &gate}).reason, "loss is not finite");
    EXPECT_EQ(asked, 2);
}

TEST(Refusal, RefusesABatchOfWeightZero) {
    expect_no_trace([](Training& run) {
        const StepReport report =
            run.accumulator.step(regression_batch(17, 9), [&](const Batch& micro) -> WeightedLoss {
                return {run.loss(micro).sum, 0};
            });
        EXPECT_FALSE(report.applied);
        EXPECT_EQ(report.reason, "zero weight");
        EXPECT_EQ(report.weight, 0);
        EXPECT_EQ(report.loss, 0);
        EXPECT_EQ(report.gradient_norm, 0);
    });
}

TEST(Refusal, RefusesABadWeightWithAnError) {
    for (double weight : {nan, infinity, -infinity, -1.0}) {
        for (std::int64_t position = 0; position < micro_batches; ++position) {
            expect_no_trace([&](Training& run) {
                const auto bad = strike(run.loss, position, [&](WeightedLoss good) -> WeightedLoss {
                    return {good.sum, weight};
                });
                expect_usage_error({"weight"}, [&] { run.accumulator.step(regression_batch(17, 9), bad); });
            });
        }
    }
}

TEST(Refusal, RefusesWeightsWhoseSumIsNotFinite) {
    expect_no_trace([](Training& run) {
        const auto heavy = [&](const Batch& micro) -> WeightedLoss { return {run.loss(micro).sum, 1.7e308}; };
        expect_usage_error({"weight"}, [&] { run.accumulator.step(regression_batch(17, 9), heavy); });
    });
}

TEST(Refusal, ANanInAMicroBatchOfWeightZeroIsHarmless) {
    for (std::int64_t position = 0; position < micro_batches; ++position) {
        Training masked, shorter;
        const Batch batch = regression_batch(20, 9);
        const auto nothing = strike(masked.loss, position, [](WeightedLoss good) -> WeightedLoss {
            return {good.sum * nan, 0};
        });
        EXPECT_TRUE(masked.accumulator.step(batch, nothing).applied);
        Batch rest;
        for (const at::Tensor& field : batch.fields) {
            rest.fields.push_back(at::cat({field.slice(0, 0, 4 * position), field.slice(0, 4 * position + 4, 20)}));
        }
        EXPECT_TRUE(shorter.accumulator.step(rest, shorter.loss).applied);
        expect_same_bits(masked.values(), shorter.values());
    }
}

TEST(Refusal, AnInterruptedStreamLeavesNoTrace) {
    expect_no_trace([](Training& run) {
        run.accumulator.begin();
        run.accumulator.add(run.loss(regression_batch(4, 9)));
        expect_usage_error({"weight"}, [&] { run.accumulator.add({run.loss(regression_batch(4, 9)).sum, -1}); });
        expect_usage_error({"begin"}, [&] { run.accumulator.add(run.loss(regression_batch(4, 9))); });
        expect_usage_error({}, [&] { run.accumulator.finish(); });
    });
}

TEST(Refusal, ReportsTheReason) {
    const auto reason = [](const Gathered& gathered) { return FiniteGate().evaluate(gathered).reason; };
    EXPECT_EQ(reason({.loss_sum = 1, .weight = 1, .gradient_norm = 1, .micro_batches = 1}), "");
    EXPECT_EQ(reason({.loss_sum = 1e300, .weight = 1e-3, .gradient_norm = 0, .micro_batches = 1}), "");
    EXPECT_EQ(reason({.loss_sum = 0, .weight = 0, .gradient_norm = 0, .micro_batches = 1}), "zero weight");
    for (double bad : {nan, infinity, -infinity}) {
        EXPECT_EQ(reason({.loss_sum = bad, .weight = 1, .gradient_norm = 1, .micro_batches = 1}), "loss is not finite");
        EXPECT_EQ(reason({.loss_sum = 1, .weight = 1, .gradient_norm = bad, .micro_batches = 1}),
                  "gradient norm is not finite");
    }
}

}  // namespace
}  // namespace microbatch
