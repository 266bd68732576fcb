#include "microbatch/step/accumulator.h"

#include <torch/optim/adamw.h>
#include <torch/optim/rmsprop.h>
#include <torch/optim/sgd.h>

#include <cmath>

#include "microbatch/optim/adamw.h"
#include "microbatch/optim/sgd.h"
#include "microbatch/optim/torch_optimizer.h"
#include "support/errors.h"
#include "support/gradients.h"
#include "support/models.h"

namespace microbatch {
namespace {

using namespace test;

const double nan = std::numeric_limits<double>::quiet_NaN();
const double infinity = std::numeric_limits<double>::infinity();

/// Two parameters of one number each, trained by plain descent at rate 1.
struct Pair {
    at::Tensor a, b;
    Parameters parameters;
    Sgd optimizer;
    Accumulator accumulator;

    explicit Pair(AccumulatorOptions options = {}, at::ScalarType type = at::kDouble)
        : a(at::zeros({1}, at::TensorOptions().dtype(type)).requires_grad_()),
          b(at::zeros({1}, at::TensorOptions().dtype(type)).requires_grad_()),
          parameters{{"a", a}, {"b", b}},
          optimizer({{.parameters = parameters}}, {.learning_rate = 1.0}),
          accumulator(parameters, optimizer, options) {}

    WeightedLoss loss(double slope_a, double slope_b, double weight) const {
        return {(a * slope_a + b * slope_b).sum(), weight};
    }
    void gather(double slope_a, double slope_b, double weight) {
        accumulator.begin();
        accumulator.add(loss(slope_a, slope_b, weight));
        accumulator.finish();
    }
    void expect_works() {
        a.detach().zero_();
        b.detach().zero_();
        gather(6, 8, 2);
        EXPECT_TRUE(accumulator.apply().applied);
        EXPECT_EQ(a.item<double>(), -3);
        EXPECT_EQ(b.item<double>(), -4);
        expect_no_gradients(parameters);
    }
};

TEST(Accumulator, DividesTheSumsOnceByTheTotalWeight) {
    Pair pair;
    pair.accumulator.begin();
    pair.accumulator.add(pair.loss(1, 8, 0.5));
    pair.accumulator.add(pair.loss(5, 0, 1.5));
    EXPECT_EQ(pair.a.grad().item<double>(), 6);
    const Gathered gathered = pair.accumulator.finish();
    EXPECT_EQ(pair.a.item<double>(), 0);  // nothing has changed yet
    EXPECT_EQ(gathered.gradient_norm, 5);
    const StepReport report = pair.accumulator.apply();
    EXPECT_EQ(pair.a.item<double>(), -3);
    EXPECT_EQ(pair.b.item<double>(), -4);
    EXPECT_TRUE(report.applied);
    EXPECT_EQ(report.reason, "");
    EXPECT_EQ(report.weight, 2);
    EXPECT_EQ(report.gradient_norm, 5);
    EXPECT_EQ(report.learning_rate, 1);
    EXPECT_EQ(report.micro_batches, 2);
}

TEST(Accumulator, ReportsTheMeanLossBeforeTheStep) {
    Pair pair;
    pair.a.detach().fill_(10);
    pair.accumulator.begin();
    pair.accumulator.add(pair.loss(1, 0, 1));
    pair.accumulator.add(pair.loss(2, 0, 4));
    pair.accumulator.finish();
    EXPECT_EQ(pair.accumulator.apply().loss, 6);  // (10 + 20) / 5
}

TEST(Accumulator, ClipsTheMeanGradientOnce) {
    Pair pair({.clip_norm = 2.0});
    pair.gather(300, 400, 100);  // mean (3, 4): norm 5, although the sum's is 500
    EXPECT_EQ(pair.accumulator.apply().gradient_norm, 5);
    // 2 / (5 + 1e-6) as torch's clip_grad_norm_; two roundings of 2.2e-16.
    EXPECT_NEAR(pair.a.item<double>(), -3 * 2 / (5 + 1e-6), 1e-15);
    EXPECT_NEAR(pair.b.item<double>(), -4 * 2 / (5 + 1e-6), 1e-15);
}

TEST(Accumulator, LeavesGradientsBelowTheClipAlone) {
    Pair({.clip_norm = 6.0}).expect_works();
}

TEST(Accumulator, ClipsTheBatchAndNotItsMicroBatches) {
    Pair pair({.clip_norm = 1.0});
    pair.accumulator.begin();
    pair.accumulator.add(pair.loss(1000, 0.5, 1));  // alone these would be clipped to nothing but a
    pair.accumulator.add(pair.loss(-1000, 0.5, 1));
    pair.accumulator.finish();
    pair.accumulator.apply();
    EXPECT_EQ(pair.a.item<double>(), 0);
    EXPECT_EQ(pair.b.item<double>(), -0.5);
}

TEST(Accumulator, MeasuresGradientsWhoseSquaresOverflowFp32) {
    Pair pair({.clip_norm = 5.0}, at::kFloat);
    pair.gather(3e30, 4e30, 1);
    // fp32 rounds 3e30 and 4e30, and the clipped gradient again: 6e-8 each.
    EXPECT_NEAR(pair.accumulator.apply().gradient_norm / 5e30, 1, 2e-7);
    EXPECT_NEAR(pair.a.item<double>(), -3, 1e-6);
    EXPECT_NEAR(pair.b.item<double>(), -4, 1e-6);
}

TEST(Accumulator, AppliesWhateverTheGradientsAre) {
    Pair pair;
    pair.gather(nan, 8, 2);
    const StepReport report = pair.accumulator.apply();
    EXPECT_TRUE(report.applied);
    EXPECT_TRUE(std::isnan(pair.a.item<double>()));
    EXPECT_EQ(pair.b.item<double>(), -4);
    pair.expect_works();
}

TEST(Accumulator, DoesNotApplyWhatHasNoWeight) {
    Pair pair;
    pair.gather(6, 8, 0);
    const StepReport report = pair.accumulator.apply();
    EXPECT_FALSE(report.applied);
    EXPECT_EQ(report.reason, "zero weight");
    EXPECT_EQ(pair.a.item<double>(), 0);
    pair.expect_works();
}

TEST(Accumulator, DiscardsAtAnyTime) {
    Pair pair;
    EXPECT_FALSE(pair.accumulator.discard("nothing").applied);
    pair.accumulator.begin();
    pair.accumulator.add(pair.loss(1, 1, 1));
    pair.accumulator.discard("half way");
    expect_no_gradients(pair.parameters);
    pair.gather(6, 8, 2);
    const StepReport report = pair.accumulator.discard("loss spike");
    EXPECT_FALSE(report.applied);
    EXPECT_EQ(report.reason, "loss spike");
    EXPECT_EQ(report.gradient_norm, 5);
    EXPECT_EQ(report.weight, 2);
    EXPECT_EQ(pair.a.item<double>(), 0);
    expect_usage_error({}, [&] { pair.accumulator.apply(); });
    pair.expect_works();
}

TEST(Accumulator, RefusesEveryMisuseAndWorksAfterwards) {
    Pair pair;
    expect_usage_error({"begin"}, [&] { pair.accumulator.add(pair.loss(1, 1, 1)); });
    pair.expect_works();
    expect_usage_error({"begin"}, [&] { pair.accumulator.finish(); });
    pair.expect_works();
    expect_usage_error({"gather"}, [&] { pair.accumulator.apply(); });
    pair.expect_works();
    expect_usage_error({"gather"}, [&] { pair.accumulator.apply(); });  // twice: expect_works() has applied
    pair.expect_works();
    pair.accumulator.begin();
    pair.accumulator.add(pair.loss(1, 1, 1));
    expect_usage_error({"finish"}, [&] { pair.accumulator.apply(); });
    pair.accumulator.discard("");
    pair.expect_works();
    pair.accumulator.begin();
    expect_usage_error({"finish()"}, [&] { pair.accumulator.begin(); });
    pair.accumulator.discard("");
    pair.expect_works();
}

TEST(Accumulator, RefusesToBeginOverAGatheredBatchAndStillAppliesIt) {
    Pair pair;
    pair.gather(6, 8, 2);
    expect_usage_error({"applied", "discarded"}, [&] { pair.accumulator.begin(); });
    expect_usage_error({"applied", "discarded"}, [&] {
        pair.accumulator.step(Batch{{at::ones({2})}}, [&](const Batch&) { return pair.loss(1, 1, 1); });
    });
    const StepReport report = pair.accumulator.apply();
    EXPECT_EQ(report.weight, 2);
    EXPECT_EQ(pair.a.item<double>(), -3);
    pair.expect_works();
}

TEST(Accumulator, RefusesSettingsOutOfRange) {
    Pair pair;
    const auto make = [&](AccumulatorOptions options) {
        return [&pair, options] { Accumulator(pair.parameters, pair.optimizer, options); };
    };
    expect_usage_error({"0"}, make({.plan = {0}}));
    expect_usage_error({"-3"}, make({.plan = {-3}}));
    expect_usage_error({"clip", "0"}, make({.clip_norm = 0}));
    expect_usage_error({"clip", "-1"}, make({.clip_norm = -1}));
    expect_usage_error({"clip", "nan"}, make({.clip_norm = nan}));
    expect_usage_error({"clip"}, make({.clip_norm = -infinity}));
    expect_usage_error({"0"}, [&] { pair.accumulator.set_plan({0}); });
    EXPECT_EQ(pair.accumulator.plan(), Plan{});
    pair.expect_works();
}

TEST(Accumulator, CutsTheNextBatchByTheNewPlan) {
    Pair pair({.plan = {3}});
    const Batch batch{{at::ones({10})}};
    const auto loss = [&](const Batch& micro) { return pair.loss(1, 1, static_cast<double>(micro.size())); };
    EXPECT_EQ(pair.accumulator.step(batch, loss).micro_batches, 4);
    pair.accumulator.set_plan({5});
    EXPECT_EQ(pair.accumulator.step(batch, loss).micro_batches, 2);
}

TEST(Accumulator, StreamingGivesTheBitsOfStep) {
    for (std::int64_t cut : {1, 3, 7, 16, 50}) {
        const auto whole_model = make_mlp(1, at::kFloat), streamed_model = make_mlp(1, at::kFloat);
        AdamW whole_optimizer({{.parameters = parameters_of(whole_model)}});
        AdamW streamed_optimizer({{.parameters = parameters_of(streamed_model)}});
        Accumulator whole(parameters_of(whole_model), whole_optimizer, {.plan = {cut}, .clip_norm = 0.5});
        Accumulator streamed(parameters_of(streamed_model), streamed_optimizer, {.clip_norm = 0.5});
        for (std::uint64_t seed = 1; seed <= 3; ++seed) {
            const Batch batch = regression_batch(50, seed, at::kFloat);
            const StepReport wanted = whole.step(batch, weighted_squares(whole_model));
            streamed.begin();
            for (std::int64_t i = 0; i < micro_batch_count(50, cut); ++i) {
                const Slice slice = micro_batch_slice(50, cut, i);
                streamed.add(weighted_squares(streamed_model)(batch.slice(slice.begin, slice.end)));
            }
            const Gathered gathered = streamed.finish();
            const StepReport report = streamed.apply();
            EXPECT_EQ(gathered.loss(), wanted.loss);
            EXPECT_EQ(report.loss, wanted.loss);
            EXPECT_EQ(report.weight, wanted.weight);
            EXPECT_EQ(report.gradient_norm, wanted.gradient_norm);
            EXPECT_EQ(report.micro_batches, wanted.micro_batches);
        }
        expect_same_bits(values_of(parameters_of(streamed_model)), values_of(parameters_of(whole_model)));
    }
}

/// An optimizer that changes a parameter and then fails.
struct Broken : Optimizer {
    explicit Broken(at::Tensor tensor) : tensor_(std::move(tensor)) {}
    void step(std::span<const GradientView>, double) override {
        tensor_.detach().fill_(7);
        if (fails) throw std::runtime_error("disk is full");
    }
    void dry_run(std::span<const GradientView>, double) override {}
    void end_dry_run() override {}
    bool has_state() const override { return false; }
    void save(const StateWriter&) const override {}
    Commit prepare(const StateReader&) override {
        return [] {};
    }
    double learning_rate() const override { return 0; }
    void set_learning_rate(double) override {}
    std::vector<at::Tensor> parameters() const override { return {tensor_}; }
    bool fails = true;

private:
    at::Tensor tensor_;
};

TEST(Accumulator, ClearsTheGradientsWhenTheOptimizerThrows) {
    const at::Tensor value = at::ones({1}).requires_grad_();
    Broken optimizer(value);
    Accumulator accumulator(Parameters{{"value", value}}, optimizer);
    const auto loss = [&](const Batch&) -> WeightedLoss { return {(value * 2).sum(), 1}; };
    EXPECT_THROW(accumulator.step(Batch{{at::ones({1})}}, loss), std::runtime_error);
    EXPECT_FALSE(value.grad().defined());
    EXPECT_EQ(value.item<double>(), 7);
    optimizer.fails = false;
    EXPECT_TRUE(accumulator.step(Batch{{at::ones({1})}}, loss).applied);
}

/// 20 steps through the Accumulator in micro-batches of 7 against a plain loop over whole batches in torch.
template <class Optimizer, class Options>
void expect_like_the_plain_loop(const Options& options) {
    const auto plain = make_mlp(1), cut = make_mlp(1);
    Optimizer plain_optimizer(plain->parameters(), options), torch_optimizer(cut->parameters(), options);
    TorchOptimizer optimizer(torch_optimizer);
    Accumulator accumulator(parameters_of(cut), optimizer, {.plan = {7}});
    for (std::uint64_t seed = 1; seed <= 20; ++seed) {
        const Batch batch = regression_batch(50, seed);
        plain_optimizer.zero_grad();
        const WeightedLoss loss = weighted_squares(plain)(batch);
        (loss.sum / loss.weight.value()).backward();
        plain_optimizer.step();
        EXPECT_TRUE(accumulator.step(batch, weighted_squares(cut)).applied);
        expect_no_gradients(parameters_of(cut));
    }
    // The bound for 20 AdamW steps in fp64; RMSprop divides by the same root.
    expect_agree(values_of(parameters_of(cut)), values_of(parameters_of(plain)), 1e-9);
    EXPECT_GT(largest_difference(values_of(parameters_of(make_mlp(1))), values_of(parameters_of(plain))), 1e-2);
}

TEST(Accumulator, DrivesTorchsOwnOptimizers) {
    using namespace torch::optim;
    expect_like_the_plain_loop<SGD>(SGDOptions(0.05).momentum(0.9).weight_decay(0.1));
    expect_like_the_plain_loop<torch::optim::AdamW>(torch::optim::AdamWOptions(0.01).weight_decay(0.1));
    expect_like_the_plain_loop<RMSprop>(RMSpropOptions(0.01));
}

}  // namespace
}  // namespace microbatch
