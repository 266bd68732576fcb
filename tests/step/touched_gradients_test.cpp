// Gradients that other code changes while a batch is gathered are an error, never a wrong update.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "microbatch/optim/sgd.h"
#include "microbatch/step/accumulator.h"
#include "support/errors.h"
#include "support/gradients.h"
#include "support/models.h"

namespace microbatch {
namespace {

using namespace test;

/// What a loss function must not do, given a model and the loss of this micro-batch.
struct Touch {
    const char* name;
    std::function<void(TanhMlp&, const at::Tensor&)> act;
};

std::vector<Touch> touches() {
    const auto first = [](TanhMlp& model) -> at::Tensor& { return model.first->weight.mutable_grad(); };
    return {{"zero_grad", [](TanhMlp& model, const at::Tensor&) { model.zero_grad(); }},
            {"zero_grad in place", [](TanhMlp& model, const at::Tensor&) { model.zero_grad(/*set_to_none=*/false); }},
            {"backward", [](TanhMlp&, const at::Tensor& sum) { sum.backward({}, /*retain_graph=*/true); }},
            {"a scaled gradient",
             [first](TanhMlp& model, const at::Tensor&) {
                 if (first(model).defined()) first(model).mul_(0.5);
             }},
            {"another gradient",
             [first](TanhMlp& model, const at::Tensor&) {
                 if (first(model).defined()) first(model) = first(model).clone();
             }},
            {"one gradient dropped", [first](TanhMlp& model, const at::Tensor&) { first(model) = at::Tensor(); }}};
}

struct Job {
    std::shared_ptr<TanhMlp> model = make_mlp(1);
    Sgd optimizer{{{.parameters = parameters_of(model)}}, {.learning_rate = 0.05}};
    Accumulator accumulator;

    explicit Job(bool sum_in_product = true)
        : accumulator(model, optimizer, {.plan = {.micro_batch = 4}, .sum_in_product = sum_in_product}) {}

    Named values() const { return values_of(parameters_of(model)); }
};

const std::vector<std::string> words{"gradient", "first.weight", "loss function", "backward()", "zero_grad"};

TEST(TouchedGradients, AreAnErrorThatNamesTheParameterAndUndoesTheStep) {
    for (const bool in_product : {true, false}) {
        for (const Touch& touch : touches()) {
            for (const int when : {2, 3}) {  // in the second micro-batch of three, or in the last
                SCOPED_TRACE(::testing::Message() << touch.name << " in micro-batch " << when);
                Job job(in_product), other(in_product);
                const Batch batch = regression_batch(10, 3);
                const LossFunction loss = weighted_squares(job.model);
                const Named before = job.values();
                int calls = 0;
                const LossFunction touching = [&](const Batch& micro) {
                    WeightedLoss result = loss(micro);
                    if (++calls == when) touch.act(*job.model, result.sum);
                    return result;
                };
                expect_usage_error(words, [&] { job.accumulator.step(batch, touching); });
                EXPECT_EQ(calls, when);
                expect_same_bits(job.values(), before);
                expect_no_gradients(parameters_of(job.model));
                EXPECT_TRUE(job.accumulator.step(batch, loss).applied);
                other.accumulator.step(batch, weighted_squares(other.model));
                expect_same_bits(job.values(), other.values());
            }
        }
    }
}

TEST(TouchedGradients, ABackwardOfItsOwnIsNoticedInTheFirstMicroBatchToo) {
    for (const bool own_sum : {true, false}) {
        Job job;
        const LossFunction loss = weighted_squares(job.model);
        const LossFunction touching = [&](const Batch& micro) {
            WeightedLoss result = loss(micro);
            own_sum ? result.sum.backward({}, /*retain_graph=*/true) : loss(micro).sum.backward();
            return result;
        };
        expect_usage_error(words, [&] { job.accumulator.step(regression_batch(10, 3), touching); });
        expect_usage_error(words, [&] { job.accumulator.gather(regression_batch(3, 3), touching); });
        expect_no_gradients(parameters_of(job.model));
    }
}

TEST(TouchedGradients, OfAMicroBatchWithoutWeightAreNoticedToo) {
    Job job;
    const LossFunction loss = weighted_squares(job.model);
    int calls = 0;
    const LossFunction touching = [&](const Batch& micro) {
        WeightedLoss result = loss(micro);
        if (++calls == 2) {
            job.model->zero_grad();
            result.weight = 0;
        }
        return result;
    };
    expect_usage_error(words, [&] { job.accumulator.step(regression_batch(10, 3), touching); });
}

TEST(TouchedGradients, AreAnErrorInAStreamedLoopToo) {
    for (const Touch& touch : touches()) {
        for (const bool before_finish : {false, true}) {
            SCOPED_TRACE(::testing::Message() << touch.name << (before_finish ? " before finish()" : " before add()"));
            Job job;
            const Batch batch = regression_batch(8, 3);
            const LossFunction loss = weighted_squares(job.model);
            const Named before = job.values();
            job.accumulator.begin();
            job.accumulator.add(loss(batch.slice(0, 4)));
            const WeightedLoss last = loss(batch.slice(4, 8));
            if (!before_finish) {
                touch.act(*job.model, last.sum);
                expect_usage_error(words, [&] { job.accumulator.add(last); });
            } else {
                job.accumulator.add(last);
                touch.act(*job.model, loss(batch).sum);
                expect_usage_error(words, [&] { job.accumulator.finish(); });
            }
            expect_no_gradients(parameters_of(job.model));
            expect_same_bits(job.values(), before);
            expect_usage_error({"gather"}, [&] { job.accumulator.apply(); });
            EXPECT_TRUE(job.accumulator.step(batch, loss).applied);
        }
    }
}

TEST(TouchedGradients, AreNotThoseThatAreOnlyRead) {
    Job job, other;
    const Batch batch = regression_batch(10, 3);
    double norms = 0.0;
    const LossFunction loss = weighted_squares(job.model);
    const LossFunction reading = [&](const Batch& micro) {
        for (const Parameter& one : parameters_of(job.model)) {
            if (one.tensor.grad().defined()) norms += one.tensor.grad().norm().item<double>();
        }
        return loss(micro);
    };
    EXPECT_TRUE(job.accumulator.step(batch, reading).applied);
    EXPECT_GT(norms, 0.0);
    other.accumulator.step(batch, weighted_squares(other.model));
    expect_same_bits(job.values(), other.values());
}

TEST(TouchedGradients, AreNotThoseOfGradientsTakenAside) {
    Job job, other;
    const Batch batch = regression_batch(10, 3);
    const LossFunction loss = weighted_squares(job.model);
    const LossFunction penalized = [&](const Batch& micro) {  // as a gradient penalty does
        const WeightedLoss result = loss(micro);
        const auto gradient = torch::autograd::grad({result.sum}, {job.model->second->bias}, {}, true, true);
        return WeightedLoss{result.sum + 0.0 * gradient[0].sum(), result.weight};
    };
    EXPECT_TRUE(job.accumulator.step(batch, penalized).applied);
    other.accumulator.step(batch, weighted_squares(other.model));
    expect_agree(job.values(), other.values(), 1e-12);
}

TEST(TouchedGradients, AddressesThatAreUsedAgainAreNotTakenForTheSameGradient) {
    const at::Tensor value = at::ones({1}, at::kDouble).requires_grad_();
    Gatherer gatherer(Parameters{{"first.weight", value}});
    for (int i = 0; i < 50; ++i) {
        gatherer.begin();
        gatherer.add({(value * 3).sum(), 1});
        value.mutable_grad() = at::Tensor();
        value.mutable_grad() = at::zeros({1}, at::kDouble);  // likely where the last one was
        expect_usage_error(words, [&] { gatherer.add({(value * 3).sum(), 1}); });
    }
}

// ---- gradients of kinds that cannot be summed

/// A word's vector times the output's weight; a sparse embedding has a sparse gradient.
struct SparseNet : torch::nn::Module {
    at::Tensor forward(const at::Tensor& ids) { return out->forward(embedding->forward(ids)); }
    torch::nn::Embedding embedding =
        register_module("embedding", torch::nn::Embedding(torch::nn::EmbeddingOptions(10, 4).sparse(true)));
    torch::nn::Linear out = register_module("out", torch::nn::Linear(4, 1));
};

TEST(GradientKinds, ASparseOneIsAnErrorThatNamesTheParameterAndTheCure) {
    for (const bool in_product : {true, false}) {
        for (const bool noise : {false, true}) {
            SparseNet net;
            Sgd optimizer({{.parameters = parameters_of(net)}}, {.learning_rate = 0.1});
            Accumulator accumulator(net, optimizer, {.plan = {.micro_batch = 2}, .sum_in_product = in_product});
            const Batch batch{{at::arange(6, at::kLong)}};
            const LossFunction loss = [&](const Batch& micro) -> WeightedLoss {
                return {net.forward(micro.fields[0]).square().sum(), static_cast<double>(micro.size())};
            };
            const Named before = values_of(parameters_of(net));
            const std::vector<std::string> said{"embedding.weight", "sparse", "sparse = false"};
            expect_usage_error(said, [&] { accumulator.step(batch, loss, {.measure_noise = noise}); });
            expect_usage_error(said, [&] { accumulator.step(batch, loss, {.stop = [] { return true; }}); });
            accumulator.begin(noise);
            expect_usage_error(said, [&] { accumulator.add(loss(batch)); });
            expect_no_gradients(parameters_of(net));
            expect_same_bits(values_of(parameters_of(net)), before);
            loss(batch).sum.backward();  // left by other code
            expect_usage_error({"embedding.weight"}, [&] { accumulator.begin(); });
            net.zero_grad();
        }
    }
}

TEST(GradientKinds, AComplexParameterIsAnErrorThatNamesIt) {
    const at::Tensor real = at::ones({2}).requires_grad_();
    const at::Tensor complex = at::ones({2}, at::kComplexFloat).requires_grad_();
    Sgd optimizer({{.parameters = {{"real", real}}}}, {.learning_rate = 0.1});
    expect_usage_error({"phase", "complex", "real parameters"}, [&] {
        Accumulator(Parameters{{"real", real}, {"phase", complex}}, optimizer);
    });
    Accumulator accumulator(Parameters{{"real", real}}, optimizer);
    expect_usage_error({"phase", "complex"}, [&] { accumulator.track({{"phase", complex}}); });
    expect_usage_error({"phase"}, [&] { Sgd({{.parameters = {{"phase", complex}}}}, {.learning_rate = 0.1}); });
}

TEST(GradientKinds, AComplexLossIsAnErrorAndAComplexStepOnTheWayIsNone) {
    const at::Tensor value = at::ones({2}, at::kDouble).requires_grad_();
    Sgd optimizer({{.parameters = {{"value", value}}}}, {.learning_rate = 0.1});
    Accumulator accumulator(Parameters{{"value", value}}, optimizer);
    const auto turned = [&] { return (value * at::ones({2}, at::kComplexDouble)).sum(); };
    const Batch batch{{at::ones({3})}};
    expect_usage_error({"complex", "real"}, [&] {
        accumulator.step(batch, [&](const Batch&) -> WeightedLoss { return {turned(), 1}; });
    });
    expect_no_gradients({{"value", value}});
    EXPECT_TRUE(accumulator.step(batch, [&](const Batch&) -> WeightedLoss { return {at::real(turned()), 1}; }).applied);
    EXPECT_EQ(value[0].item<double>(), 1 - 0.1);
}

}  // namespace
}  // namespace microbatch
