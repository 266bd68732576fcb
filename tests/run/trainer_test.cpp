#include "microbatch/run/trainer.h"

#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "microbatch/optim/adamw.h"
#include "support/errors.h"
#include "support/gradients.h"
#include "support/models.h"
#include "support/tensors.h"

namespace microbatch {
namespace {

using namespace test;

constexpr std::int64_t largest = std::numeric_limits<std::int64_t>::max();

/// Regression data whose fourth field is the sample's own index.
TensorDataset numbered(std::int64_t samples, std::int64_t tokens_per_sample = 1) {
    Batch rows = regression_batch(samples, 1);
    rows.fields.push_back(at::arange(samples, at::kLong));
    return TensorDataset(rows, tokens_per_sample);
}

/// A run, and the samples it has seen in order.
struct Training {
    std::shared_ptr<TanhMlp> model = make_mlp(1);
    Parameters parameters = parameters_of(model);
    AdamW optimizer{{{.parameters = parameters}}, {.learning_rate = 0.125}};
    Accumulator accumulator{parameters, optimizer, {.plan = {3}}};
    std::vector<std::int64_t> seen;
    std::function<void()> before_loss = [] {};
    TensorDataset dataset;
    Trainer trainer;

    explicit Training(TrainerOptions options, std::int64_t tokens_per_sample = 1, std::int64_t samples = 23)
        : dataset(numbered(samples, tokens_per_sample)), trainer(accumulator, dataset, loss(), options) {}
    Training(const Training&) = delete;

    LossFunction loss() {
        return [this](const Batch& micro) -> WeightedLoss {
            before_loss();
            const at::Tensor& ids = micro.fields[3];
            for (std::int64_t i = 0; i < micro.size(); ++i) seen.push_back(ids[i].item<std::int64_t>());
            return weighted_squares(model)(micro);
        };
    }
    /// The samples of every batch up to the end.
    std::vector<std::int64_t> batches() {
        std::vector<std::int64_t> sizes;
        while (!trainer.done()) sizes.push_back(trainer.step().samples);
        return sizes;
    }
};

using Sizes = std::vector<std::int64_t>;

TEST(Trainer, TrainsForSteps) {
    Training run({.batch = 4, .length = {3, Unit::steps}});
    EXPECT_EQ(run.batches(), (Sizes{4, 4, 4}));
    EXPECT_EQ(run.trainer.progress(), (Progress{3, 12, 12}));
    expect_usage_error({}, [&] { run.trainer.step(); });
    EXPECT_EQ(run.trainer.progress(), (Progress{3, 12, 12}));
}

TEST(Trainer, TrainsForSamplesWithASmallerLastBatch) {
    EXPECT_EQ(Training({.batch = 4, .length = {10, Unit::samples}}).batches(), (Sizes{4, 4, 2}));
    EXPECT_EQ(Training({.batch = 4, .length = {8, Unit::samples}}).batches(), (Sizes{4, 4}));
    EXPECT_EQ(Training({.batch = 4, .length = {1, Unit::samples}}).batches(), (Sizes{1}));
    EXPECT_EQ(Training({.batch = largest, .length = {10, Unit::samples}}).batches(), (Sizes{10}));
}

TEST(Trainer, TrainsForTokensRoundedUpToASample) {
    const auto batches = [](std::int64_t batch, std::int64_t tokens) {
        return Training({.batch = batch, .length = {tokens, Unit::tokens}}, 16).batches();
    };
    EXPECT_EQ(batches(3, 96), (Sizes{3, 3}));
    EXPECT_EQ(batches(3, 100), (Sizes{3, 2, 2}));  // no single sample is left for the end: BatchNorm wants two
    EXPECT_EQ(batches(3, 112), (Sizes{3, 2, 2}));
    EXPECT_EQ(batches(3, 113), (Sizes{3, 3, 2}));
    EXPECT_EQ(batches(3, 1), (Sizes{1}));
    EXPECT_EQ(batches(largest, 40), (Sizes{3}));
}

TEST(Trainer, AcceptsTheLargestLengths) {
    for (Unit unit : {Unit::steps, Unit::samples, Unit::tokens}) {
        Training run({.batch = 2, .length = {largest, unit}}, 16);
        EXPECT_EQ(run.trainer.step().samples, 2) << to_string(unit);
        EXPECT_FALSE(run.trainer.done());
    }
}

TEST(Trainer, LengthZeroIsDoneAtOnce) {
    Training run({.batch = 4, .length = {0, Unit::tokens}});
    EXPECT_TRUE(run.trainer.done());
    expect_usage_error({}, [&] { run.trainer.step(); });
}

TEST(Trainer, AcceptsBatchesLargerThanTheDataset) {
    Training run({.batch = 50, .length = {1, Unit::steps}});
    EXPECT_EQ(run.trainer.step().samples, 50);
    ASSERT_EQ(run.seen.size(), 50u);
    for (std::int64_t id = 0; id < 23; ++id) EXPECT_EQ(std::count(run.seen.begin(), run.seen.begin() + 46, id), 2);
}

TEST(Trainer, ReportsWhatItDid) {
    Training run({.batch = 7, .length = {9, Unit::samples}}, 16);
    const TrainerReport first = run.trainer.step();
    EXPECT_EQ(first.progress, (Progress{1, 7, 112}));
    EXPECT_EQ(first.samples, 7);
    EXPECT_EQ(first.step.micro_batches, 3);
    EXPECT_GT(first.seconds, 0);
    const TrainerReport second = run.trainer.step();
    EXPECT_EQ(second.progress, (Progress{2, 9, 144}));
    EXPECT_EQ(second.samples, 2);
    EXPECT_EQ(run.trainer.progress(), second.progress);
}

TEST(Trainer, SetsTheLearningRateOfEveryStepInTheSchedulesUnit) {
    struct Case {
        Unit unit;
        std::int64_t warmup, length;
        std::vector<double> rates;  // by hand, with peak 1 and batches of 4, 4, 2 samples of 16 tokens
    };
    const Case cases[] = {
        {Unit::steps, 0, 4, {1, 0.75, 0.5}},         {Unit::samples, 0, 16, {1, 0.75, 0.5}},
        {Unit::tokens, 0, 256, {1, 0.75, 0.5}},      {Unit::steps, 2, 10, {0.5, 1, 1}},
        {Unit::samples, 16, 32, {0.25, 0.5, 0.625}}, {Unit::tokens, 256, 512, {0.25, 0.5, 0.625}},
    };
    for (const Case& c : cases) {
        const Schedule schedule{
            .shape = ScheduleShape::linear, .peak = 1, .warmup = {c.warmup, c.unit}, .length = {c.length, c.unit}};
        Training run({.batch = 4, .length = {10, Unit::samples}, .schedule = schedule}, 16);
        for (double rate : c.rates) {
            const TrainerReport report = run.trainer.step();
            EXPECT_EQ(report.step.learning_rate, rate) << to_string(c.unit);
            EXPECT_EQ(run.optimizer.learning_rate(), rate);
        }
        EXPECT_TRUE(run.trainer.done());
    }
}

TEST(Trainer, WithoutAScheduleLeavesTheLearningRateAlone) {
    Training run({.batch = 4, .length = {3, Unit::steps}});
    EXPECT_EQ(run.trainer.step().step.learning_rate, 0.125);
    run.optimizer.set_learning_rate(0.5);
    EXPECT_EQ(run.trainer.step().step.learning_rate, 0.5);
}

TEST(Trainer, VisitsEverySampleOnceAnEpochInTheOrderOfTheSeed) {
    std::vector<std::vector<std::int64_t>> orders;
    for (std::uint64_t seed : {1, 1, 2}) {
        Training run({.batch = 4, .length = {46, Unit::samples}, .seed = seed});
        run.batches();
        orders.push_back(run.seen);
        for (std::int64_t epoch : {0, 23}) {
            std::vector<std::int64_t> ids(run.seen.begin() + epoch, run.seen.begin() + epoch + 23), all(23);
            EXPECT_FALSE(std::is_sorted(ids.begin(), ids.end()));
            std::sort(ids.begin(), ids.end());
            std::iota(all.begin(), all.end(), 0);
            EXPECT_EQ(ids, all);
        }
    }
    EXPECT_EQ(orders[0], orders[1]);
    EXPECT_NE(orders[0], orders[2]);
}

struct Arranged : TensorDataset {
    using TensorDataset::TensorDataset;
    void arrange(std::vector<std::int64_t>& batch) const override { std::sort(batch.begin(), batch.end()); }
};

TEST(Trainer, TakesTheSamplesOfABatchInTheOrderOfTheDataset) {
    const TrainerOptions options{.batch = 8, .length = {2, Unit::steps}};
    Training drawn(options), arranged(options);
    const Arranged dataset(arranged.dataset.rows());
    Trainer trainer(arranged.accumulator, dataset, arranged.loss(), options);
    const TrainerReport first = trainer.step(), second = trainer.step();
    EXPECT_EQ(drawn.batches(), (Sizes{first.samples, second.samples}));
    EXPECT_NE(drawn.seen, arranged.seen);
    for (const std::int64_t begin : {0, 8}) {
        std::sort(drawn.seen.begin() + begin, drawn.seen.begin() + begin + 8);
    }
    EXPECT_EQ(drawn.seen, arranged.seen);
}

TEST(Trainer, TheSameSeedGivesTheSameBits) {
    const TrainerOptions options{.batch = 4, .length = {30, Unit::samples}, .seed = 7};
    Training first(options), second(options), other({.batch = 4, .length = {30, Unit::samples}, .seed = 8});
    first.batches();
    at::rand({100});  // torch's own generator is no part of it
    second.batches();
    other.batches();
    expect_same_bits(values_of(first.parameters), values_of(second.parameters));
    EXPECT_GT(largest_difference(values_of(first.parameters), values_of(other.parameters)), 1e-6);
}

TEST(Trainer, AfterAnExceptionContinuesWithTheSameBits) {
    const Schedule schedule{.shape = ScheduleShape::linear, .peak = 0.1, .length = {30, Unit::samples}};
    const TrainerOptions options{.batch = 7, .length = {30, Unit::samples}, .schedule = schedule, .seed = 3};
    for (int position = 0; position < 3; ++position) {
        Training hurt(options), healthy(options);
        healthy.batches();
        for (int calls = 0; !hurt.trainer.done();) {
            const std::vector<std::int64_t> seen = hurt.seen;
            const Progress progress = hurt.trainer.progress();
            hurt.before_loss = [&] {
                if (calls++ == position) throw std::runtime_error("struck");
            };
            calls = 0;
            EXPECT_THROW(hurt.trainer.step(), std::runtime_error);
            EXPECT_EQ(hurt.trainer.progress(), progress);
            hurt.seen = seen;
            hurt.before_loss = [] {};
            hurt.trainer.step();
            if (hurt.trainer.progress().samples == 28) break;  // the last batch has no third micro-batch to strike
        }
        hurt.batches();
        EXPECT_EQ(hurt.seen, healthy.seen);
        expect_same_bits(values_of(hurt.parameters), values_of(healthy.parameters));
    }
}

/// Data that cannot be read while `broken`.
struct BrokenDataset : Dataset {
    std::int64_t size() const override { return 23; }
    Batch get(std::span<const std::int64_t> indices) const override {
        if (broken) throw Error(ErrorKind::bad_data, "the file is gone");
        return numbered(23).get(indices);
    }
    bool broken = false;
};

TEST(Trainer, DataThatCannotBeReadDoesNotMoveThePosition) {
    Training healthy({.batch = 4, .length = {12, Unit::samples}}), hurt({.batch = 4, .length = {12, Unit::samples}});
    BrokenDataset dataset;
    Trainer trainer(hurt.accumulator, dataset, hurt.loss(), {.batch = 4, .length = {12, Unit::samples}});
    healthy.batches();
    while (!trainer.done()) {
        dataset.broken = true;
        EXPECT_EQ(error_message(ErrorKind::bad_data, [&] { trainer.step(); }), "the file is gone");
        dataset.broken = false;
        trainer.step();
    }
    EXPECT_EQ(hurt.seen, healthy.seen);
}

TEST(Trainer, ARefusedBatchCountsAsSeen) {
    Training run({.batch = 4, .length = {12, Unit::samples}});
    run.trainer.step();
    const Named before = values_of(run.parameters);
    run.model->first->bias.detach().fill_(std::numeric_limits<double>::quiet_NaN());
    const TrainerReport report = run.trainer.step();
    EXPECT_FALSE(report.step.applied);
    EXPECT_EQ(report.step.reason, "loss is not finite");
    EXPECT_EQ(report.progress, (Progress{2, 8, 8}));
    EXPECT_EQ(run.seen.size(), 8u);
    run.model->first->bias.detach().copy_(before[1].tensor);
    expect_same_bits(values_of(run.parameters), before);
    EXPECT_TRUE(run.trainer.step().step.applied);
}

/// A trainer with a guard that has seen enough after 20 steps.
TrainerOptions guarded(std::int64_t steps) {
    return {.batch = 4, .length = {steps, Unit::steps}, .guard = SpikeGuardOptions{.window = 32, .least = 20}};
}

TEST(Trainer, AGuardRefusesAPoisonedBatchBeforeTheUpdate) {
    Training run(guarded(60));
    for (int i = 0; i < 40; ++i) ASSERT_TRUE(run.trainer.step().step.applied);
    const Named before = values_of(run.parameters);
    const auto poison = [&](double factor) {
        const at::NoGradGuard no_grad;
        run.dataset.rows().fields[1].mul_(factor);
    };
    poison(1000);
    const TrainerReport report = run.trainer.step();
    EXPECT_FALSE(report.step.applied);
    EXPECT_FALSE(report.diverged);
    EXPECT_EQ(report.step.reason.find("loss of "), 0u) << report.step.reason;
    EXPECT_EQ(report.progress.steps, 41);
    expect_same_bits(values_of(run.parameters), before);
    poison(1e-3);
    EXPECT_TRUE(run.trainer.step().step.applied);
}

TEST(Trainer, AGuardReportsWhenSkippingBatchesDoesNotHelp) {
    Training run(guarded(60));
    for (int i = 0; i < 40; ++i) ASSERT_TRUE(run.trainer.step().step.applied);
    run.model->first->bias.detach().fill_(std::numeric_limits<double>::quiet_NaN());
    for (int i = 0; i < 9; ++i) EXPECT_FALSE(run.trainer.step().diverged);
    const TrainerReport report = run.trainer.step();
    EXPECT_TRUE(report.diverged);
    EXPECT_FALSE(report.step.applied);
    EXPECT_EQ(report.step.reason, "loss is not finite");
}

TEST(Trainer, AGuardDoesNotJudgeALastSmallerBatch) {
    TrainerOptions options = guarded(0);
    options.length = {4 * 40 + 2, Unit::samples};
    Training run(options);
    for (int i = 0; i < 40; ++i) ASSERT_TRUE(run.trainer.step().step.applied);
    const at::NoGradGuard no_grad;
    run.dataset.rows().fields[1].mul_(1000);
    const at::AutoGradMode gradients(true);
    const TrainerReport report = run.trainer.step();
    EXPECT_EQ(report.samples, 2);
    EXPECT_TRUE(report.step.applied);
}

TEST(Trainer, AStepThatThrowsLeavesTheGuardUnchanged) {
    Training run(guarded(60)), other(guarded(60));
    for (int i = 0; i < 40; ++i) {
        ASSERT_TRUE(run.trainer.step().step.applied);
        ASSERT_TRUE(other.trainer.step().step.applied);
    }
    run.before_loss = [] { throw std::runtime_error("loss"); };
    for (int i = 0; i < 30; ++i) EXPECT_ANY_THROW(run.trainer.step());
    run.before_loss = [] {};
    for (int i = 0; i < 20; ++i) EXPECT_EQ(run.trainer.step().step.applied, other.trainer.step().step.applied);
    expect_same_bits(values_of(run.parameters), values_of(other.parameters));
}

TEST(Trainer, RefusesInvalidOptions) {
    const Interval one{1, Unit::steps};
    expect_usage_error({"batch", "0"}, [&] { Training({.batch = 0, .length = one}); });
    expect_usage_error({"batch", "-4"}, [&] { Training({.batch = -4, .length = one}); });
    expect_usage_error({"length", "-1"}, [&] { Training({.batch = 4, .length = {-1, Unit::samples}}); });
    expect_usage_error({"sigmas"},
                       [&] { Training({.batch = 4, .length = one, .guard = SpikeGuardOptions{.sigmas = 0}}); });
    expect_usage_error({"peak"}, [&] { Training({.batch = 4, .length = one, .schedule = Schedule{.peak = -1}}); });
    expect_usage_error({"0 samples"}, [&] { Training({.batch = 4, .length = one}, 1, 0); });
    expect_usage_error({"token", "0"}, [&] { Training({.batch = 4, .length = {8, Unit::tokens}}, 0); });
}

TEST(MeanLoss, WeighsEverySampleAndDoesNotDependOnTheMicroBatch) {
    const auto model = make_mlp(1);
    const TensorDataset dataset = numbered(23);
    const WeightedLoss whole = weighted_squares(model)(regression_batch(23, 1));
    const double wanted = whole.sum.item<double>() / whole.weight.value();
    const auto loss = [&](const Batch& micro) {
        EXPECT_FALSE(at::GradMode::is_enabled());
        return weighted_squares(model)(micro);
    };
    for (std::int64_t cut : {std::int64_t{1}, std::int64_t{3}, std::int64_t{7}, std::int64_t{23}, whole_batch}) {
        EXPECT_NEAR(mean_loss(dataset, cut, loss) / wanted, 1, 1e-14);  // 23 roundings of 1.1e-16, either way
    }
    EXPECT_TRUE(at::GradMode::is_enabled());
    expect_no_gradients(parameters_of(model));
}

TEST(MeanLoss, SumsAndDividesOnce) {
    const TensorDataset dataset(
        Batch{{test::tensor_of({1.0, 2.0, 30.0}, at::kFloat), test::tensor_of({1.0, 0.0, 3.0}, at::kFloat)}});
    const auto loss = [](const Batch& b) -> WeightedLoss {
        return {b.fields[0].sum(), b.fields[1].sum().item<double>()};
    };
    EXPECT_EQ(mean_loss(dataset, whole_batch, loss), 33.0 / 4);
    // The second sample has no weight; at one sample a time it is not looked at, as in training.
    EXPECT_EQ(mean_loss(dataset, 1,
                        [](const Batch& b) -> WeightedLoss {
                            const double weight = b.fields[1].sum().item<double>();
                            return {weight > 0 ? b.fields[0].sum() : at::scalar_tensor(std::nan("")), weight};
                        }),
              31.0 / 4);
    EXPECT_EQ(mean_loss(dataset, 2, [](const Batch& b) -> WeightedLoss { return {b.fields[0].sum(), 0}; }), 0);
}

TEST(MeanLoss, RefusesMicroBatchesBelowOneAndPassesExceptionsOn) {
    const TensorDataset dataset = numbered(5);
    const auto broken = [](const Batch&) -> WeightedLoss { throw std::runtime_error("struck"); };
    expect_usage_error({"0"}, [&] { mean_loss(dataset, 0, broken); });
    expect_usage_error({"-1"}, [&] { mean_loss(dataset, -1, broken); });
    EXPECT_THROW(mean_loss(dataset, 2, broken), std::runtime_error);
    EXPECT_TRUE(at::GradMode::is_enabled());
}

}  // namespace
}  // namespace microbatch
