// The gradient norms of micro-batches, measured during the step, and the noise that they show.
#include "microbatch/step/micro_batch_norms.h"

#include "microbatch/memory/budget_allocator.h"
#include "microbatch/optim/sgd.h"
#include "microbatch/step/accumulator.h"
#include "support/device_memory.h"
#include "support/gradients.h"
#include "support/jobs.h"
#include "support/models.h"

namespace microbatch {
namespace {

using namespace test;

double squared_norm(const Named& gradients) {
    double sum = 0.0;
    for (const Parameter& one : gradients) {
        if (one.tensor.defined()) sum += one.tensor.to(at::kDouble).square().sum().item<double>();
    }
    return sum;
}

TEST(MicroBatchGradientNorms, AreThoseOfEveryMicroBatchByItself) {
    const auto model = make_mlp(1);
    const Parameters parameters = parameters_of(model);
    const LossFunction loss = weighted_squares(model);
    const Batch batch = regression_batch(17, 3);
    Gatherer gatherer(parameters);
    const auto micro_batch = [&](std::int64_t i) {
        const Slice slice = micro_batch_slice(17, 5, i);
        return batch.slice(slice.begin, slice.end);
    };
    const auto measured = [&](std::int64_t micro_batches) {
        gatherer.begin(/*measure_noise=*/true);
        for (std::int64_t i = 0; i < micro_batches; ++i) gatherer.add(loss(micro_batch(i)));
        const NoiseSums parts = gatherer.finish().parts;
        gatherer.clear();
        return parts;
    };
    NoiseSums before;
    for (std::int64_t i = 0; i < 4; ++i) {
        const double wanted = squared_norm(oracle_gradients(parameters, micro_batch(i), loss));
        const double weight = loss(micro_batch(i)).weight.value();
        const NoiseSums parts = measured(i + 1);
        EXPECT_EQ(parts.count, i + 1);
        EXPECT_DOUBLE_EQ(parts.weight, before.weight + weight);
        // Weights from 1e-3 to 1e6: a difference of sums in fp64 is good to 1e-16 of the sum, squared and over 1e9.
        EXPECT_NEAR((parts.squares - before.squares) / weight / wanted, 1, 1e-5) << i;
        before = parts;
    }
}

TEST(MicroBatchGradientNorms, MeasuringChangesNoBit) {
    for (const bool in_product : {true, false}) {
        Job plain = gpt_job({.layers = 2, .heads = 2, .width = 16, .length = 8, .vocabulary = 32, .dropout = 0.1});
        const Batch batch = plain.make_batch(10);
        Named wanted;
        for (const bool measured : {false, true}) {
            at::manual_seed(5);
            Gatherer gatherer(plain.parameters, in_product);
            const Gathered gathered = gatherer.gather(batch, {.micro_batch = 4}, plain.loss, measured);
            EXPECT_EQ(gathered.parts.count, measured ? 3 : 0);
            if (!measured) wanted = gradients_of(plain.parameters);
            if (measured) expect_same_bits(gradients_of(plain.parameters), wanted);
            gatherer.clear();
        }
    }
}

TEST(MicroBatchGradientNorms, AParameterMayGetItsFirstGradientLater) {
    const at::Tensor first = at::ones({2}, at::kDouble).requires_grad_(),
                     late = at::ones({2}, at::kDouble).requires_grad_();
    Gatherer gatherer(Parameters{{"first", first}, {"late", late}});
    gatherer.begin(/*measure_noise=*/true);
    gatherer.add({first.sum(), 1.0});
    gatherer.add({(first + 3 * late).sum(), 2.0});
    gatherer.add({first.sum() * 0, 0.0});
    const Gathered gathered = gatherer.finish();
    EXPECT_EQ(gathered.parts.count, 2);
    EXPECT_DOUBLE_EQ(gathered.parts.weight, 3);
    EXPECT_DOUBLE_EQ(gathered.parts.squares, 1 * 2 + 2 * ((2 + 18) / 4.0));
    gatherer.clear();
}

TEST(MicroBatchGradientNorms, AStepReportsTheNoiseWhereItWasToBeMeasured) {
    const auto model = make_mlp(1);
    const Parameters parameters = parameters_of(model);
    Sgd optimizer({{.parameters = parameters}}, {.learning_rate = 0.0});
    Accumulator accumulator(parameters, optimizer, {.plan = {.micro_batch = 4}});
    const LossFunction loss = weighted_squares(model);
    EXPECT_FALSE(accumulator.step(regression_batch(12, 1), loss).noise);
    const StepReport measured = accumulator.step(regression_batch(12, 1), loss, {.measure_noise = true});
    ASSERT_TRUE(measured.noise);
    EXPECT_NEAR(measured.noise->squared_gradient + measured.noise->variance / measured.weight,
                measured.gradient_norm * measured.gradient_norm,
                1e-9 * measured.gradient_norm * measured.gradient_norm);
    // One micro-batch says nothing.
    EXPECT_FALSE(accumulator.step(regression_batch(4, 1), loss, {.measure_noise = true}).noise);
}

TEST(MicroBatchGradientNorms, AStreamedBatchReportsTheNoiseOfTheSameBatchInOneCall) {
    const auto model = make_mlp(1);
    const Parameters parameters = parameters_of(model);
    Sgd optimizer({{.parameters = parameters}}, {.learning_rate = 0.0});
    Accumulator accumulator(model, optimizer, {.plan = {.micro_batch = 4}});
    const LossFunction loss = weighted_squares(model);
    const Batch batch = regression_batch(10, 1);
    const StepReport wanted = accumulator.step(batch, loss, {.measure_noise = true});
    ASSERT_TRUE(wanted.noise);
    const auto streamed = [&](bool measure_noise) {
        accumulator.begin(measure_noise);
        for (const std::int64_t i : {0, 4, 8}) {
            accumulator.add(loss(batch.slice(i, std::min<std::int64_t>(i + 4, 10))));
        }
        accumulator.finish();
        return accumulator.apply();
    };
    EXPECT_FALSE(streamed(false).noise);
    const StepReport report = streamed(true);
    ASSERT_TRUE(report.noise);
    EXPECT_EQ(report.noise->variance, wanted.noise->variance);
    EXPECT_EQ(report.noise->squared_gradient, wanted.noise->squared_gradient);
    EXPECT_EQ(report.gradient_norm, wanted.gradient_norm);
}

TEST(MicroBatchGradientNorms, WhereACopyOfTheGradientsDoesNotFitTheStepIsMadeWithout) {
    install_budget_allocator();
    const auto model = make_mlp(1, at::kFloat, 64, 1024, 64);  // half a MiB of parameters
    const Parameters parameters = parameters_of(model);
    Sgd optimizer({{.parameters = parameters}}, {.learning_rate = 0.1});
    Accumulator accumulator(parameters, optimizer, {.plan = {.micro_batch = 2}});
    const LossFunction loss = weighted_squares(model);
    const Batch batch = regression_batch(8, 1, at::kFloat, 64, 64);
    accumulator.step(batch, loss);
    test::reset_peak_memory();
    accumulator.step(batch, loss);
    const test::BudgetScope tight(test::memory_use().peak_bytes + 100'000);
    const StepReport report = accumulator.step(batch, loss, {.measure_noise = true});
    EXPECT_TRUE(report.applied);
    EXPECT_FALSE(report.noise);
    EXPECT_EQ(report.out_of_memory, 0);
    EXPECT_EQ(report.plan.micro_batch, 2);
}

}  // namespace
}  // namespace microbatch
