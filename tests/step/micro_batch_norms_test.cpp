// The gradients of micro-batches measured on the way, and what they say of the noise.
#include "microbatch/step/micro_batch_norms.h"

#include "microbatch/memory/budget_allocator.h"
#include "microbatch/optim/sgd.h"
#include "microbatch/step/accumulator.h"
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
    gatherer.begin(/*measure_parts=*/true);
    NoiseSums before;
    for (std::int64_t i = 0; i < 4; ++i) {
        const Slice slice = micro_batch_slice(17, 5, i);
        const Batch micro = batch.slice(slice.begin, slice.end);
        gatherer.add(loss(micro));
        const NoiseSums now = gatherer.open().so_far.parts;
        EXPECT_EQ(now.count, i + 1);
        const double weight = loss(micro).weight;
        EXPECT_DOUBLE_EQ(now.weight, before.weight + weight);
        before = now;
    }
    gatherer.clear();
    // One by one, each beside a first whose gradient is nothing.
    for (std::int64_t i = 0; i < 4; ++i) {
        const Slice slice = micro_batch_slice(17, 5, i);
        const Batch micro = batch.slice(slice.begin, slice.end);
        const double wanted = squared_norm(oracle_gradients(parameters, micro, loss));
        gatherer.begin(/*measure_parts=*/true);
        for (std::int64_t j = 0; j < i; ++j) {
            const Slice earlier = micro_batch_slice(17, 5, j);
            gatherer.add(loss(batch.slice(earlier.begin, earlier.end)));
        }
        const double squares = gatherer.open().so_far.parts.squares;
        gatherer.add(loss(micro));
        const NoiseSums parts = gatherer.open().so_far.parts;
        gatherer.clear();
        const double weight = loss(micro).weight;
        // Weights from 1e-3 to 1e6: a difference of sums in fp64 is good to 1e-16 of the sum, squared and over 1e9.
        EXPECT_NEAR((parts.squares - squares) / weight / wanted, 1, 1e-5) << i;
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
    Gatherer gatherer({{"first", first}, {"late", late}});
    gatherer.begin(/*measure_parts=*/true);
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

TEST(MicroBatchGradientNorms, WhereACopyOfTheGradientsDoesNotFitTheStepIsMadeWithout) {
    install_budget_allocator();
    const auto model = make_mlp(1, at::kFloat, 64, 1024, 64);  // half a MiB of parameters
    const Parameters parameters = parameters_of(model);
    Sgd optimizer({{.parameters = parameters}}, {.learning_rate = 0.1});
    Accumulator accumulator(parameters, optimizer, {.plan = {.micro_batch = 2}});
    const LossFunction loss = weighted_squares(model);
    const Batch batch = regression_batch(8, 1, at::kFloat, 64, 64);
    accumulator.step(batch, loss);
    reset_peak_memory();
    accumulator.step(batch, loss);
    const BudgetScope tight(memory_use().peak_bytes + 100'000);
    const StepReport report = accumulator.step(batch, loss, {.measure_noise = true});
    EXPECT_TRUE(report.applied);
    EXPECT_FALSE(report.noise);
    EXPECT_EQ(report.out_of_memory, 0);
    EXPECT_EQ(report.plan.micro_batch, 2);
}

}  // namespace
}  // namespace microbatch
