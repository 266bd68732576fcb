// The mean gradient in .grad, for an optimizer of the caller's own.
#include <gtest/gtest.h>

#include <stdexcept>

#include "microbatch/optim/adamw.h"
#include "microbatch/step/accumulator.h"
#include "support/errors.h"
#include "support/gradients.h"
#include "support/models.h"

namespace microbatch {
namespace {

using namespace test;

struct HandingOver {
    std::shared_ptr<TanhMlp> model = make_mlp(1);
    Parameters parameters = parameters_of(model);
    AdamW optimizer{{{.parameters = parameters}}};
    Accumulator accumulator{parameters, optimizer, {.plan = {3}}};
    Batch batch = regression_batch(8, 2);

    Named whole_gradient() {
        const WeightedLoss loss = weighted_squares(model)(batch);
        (loss.sum / loss.weight.value()).backward();
        Named result = gradients_of(parameters);
        for (const Parameter& one : parameters) one.tensor.mutable_grad().reset();
        return result;
    }
};

TEST(HandOver, LeavesTheMeanGradientWithoutACopy) {
    HandingOver job;
    const Named whole = job.whole_gradient();
    job.accumulator.gather(job.batch, weighted_squares(job.model));
    std::vector<const void*> sums;
    for (const Parameter& one : job.parameters) sums.push_back(one.tensor.grad().const_data_ptr());
    const StepReport report = job.accumulator.hand_over();
    EXPECT_FALSE(report.applied);
    EXPECT_GT(report.gradient_norm, 0.0);
    for (std::size_t i = 0; i < sums.size(); ++i) {
        const at::Tensor& gradient = job.parameters[i].tensor.grad();
        EXPECT_EQ(gradient.const_data_ptr(), sums[i]);
        // In fp64; a sum of 8 samples in another order.
        EXPECT_TRUE(at::allclose(gradient, whole[i].tensor, 1e-12, 1e-14));
    }
}

TEST(HandOver, TheNextBatchWantsThemCleared) {
    HandingOver job;
    job.accumulator.gather(job.batch, weighted_squares(job.model));
    job.accumulator.hand_over();
    expect_usage_error({"first.weight", "gradient"},
                       [&] { job.accumulator.gather(job.batch, weighted_squares(job.model)); });
    for (const Parameter& one : job.parameters) one.tensor.mutable_grad().reset();
    job.accumulator.gather(job.batch, weighted_squares(job.model));
    EXPECT_TRUE(job.accumulator.apply().applied);
}

TEST(HandOver, ABatchOfWeightZeroLeavesNoGradient) {
    HandingOver job;
    job.accumulator.gather(job.batch, [](const Batch&) -> WeightedLoss { return {at::zeros({}), 0.0}; });
    EXPECT_EQ(job.accumulator.hand_over().weight, 0.0);
    expect_no_gradients(job.parameters);
}

TEST(HandOver, IsRefusedWithoutAGatheredBatch) {
    HandingOver job;
    expect_usage_error({"gather"}, [&] { job.accumulator.hand_over(); });
    job.accumulator.gather(job.batch, weighted_squares(job.model));
    job.accumulator.apply();
    expect_usage_error({"gather"}, [&] { job.accumulator.hand_over(); });
}

/// What another language's code throws on the way.
struct Foreign : std::runtime_error {
    using std::runtime_error::runtime_error;
};

/// Bare tensors, whose backward pass may fail.
struct Failing : Model {
    explicit Failing(Parameters all) : all_(std::move(all)) {}
    Parameters parameters() const override { return all_; }
    void backward(const std::vector<at::Tensor>& roots, const std::vector<at::Tensor>& gradients,
                  bool again) const override {
        Model::backward(roots, gradients, again);
        if (--calls == 0) throw Foreign("in backward");
    }
    mutable int calls = 0;

private:
    Parameters all_;
};

TEST(ModelBackward, AnExceptionOfTheModelPassesAndLeavesNoGradient) {
    HandingOver job;
    const auto model = std::make_shared<Failing>(job.parameters);
    Accumulator accumulator(model, job.optimizer, {.plan = {3}});
    for (int call = 1; call <= 3; ++call) {
        model->calls = call;
        EXPECT_THROW(accumulator.step(job.batch, weighted_squares(job.model)), Foreign);
        expect_no_gradients(job.parameters);
    }
    EXPECT_TRUE(accumulator.step(job.batch, weighted_squares(job.model)).applied);
}

}  // namespace
}  // namespace microbatch
