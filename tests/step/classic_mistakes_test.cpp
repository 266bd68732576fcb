// What loops made by hand get wrong. Each mistake is written out in plain torch, shown to miss the whole batch by far
// more than rounding, and to be impossible, or an error, with the library.
#include <torch/optim/sgd.h>

#include "microbatch/optim/sgd.h"
#include "microbatch/run/trainer.h"
#include "support/errors.h"
#include "support/gradients.h"
#include "support/models.h"

namespace microbatch {
namespace {

using namespace test;

constexpr double rate = 0.05;
constexpr double right = 1e-12;  // the contract's bound for SGD in fp64
constexpr double wrong = 1e-2;   // a mistake changes some parameter by more than a hundredth
constexpr std::int64_t samples = 50, micro_batch = 16;

/// Samples in the order of the data set, `count` a batch, the last one smaller.
std::vector<Batch> cut(const Batch& data, std::int64_t count) {
    std::vector<Batch> parts;
    for (std::int64_t i = 0; i < data.size(); i += count) {
        parts.push_back(data.slice(i, std::min(i + count, data.size())));
    }
    return parts;
}

/// Three inputs, two outputs, and of each sample 1 to 40 target tokens: weights as ragged as text's.
Batch ragged_batch(std::uint64_t seed, std::int64_t count = samples) {
    Batch batch = regression_batch(count, seed);
    at::Generator random = generator(seed + 100);
    batch.fields[2] = at::randint(1, 5, {count}, random, at::kLong).pow(3).to(at::kDouble);
    batch.fields[1] = batch.fields[1] + batch.fields[2].unsqueeze(1) / 10;  // long samples differ from short ones
    return batch;
}

/// A model in plain torch and what is done to it.
struct ByHand {
    std::shared_ptr<TanhMlp> model = make_mlp(1);
    torch::optim::SGD optimizer{model->parameters(), torch::optim::SGDOptions(rate)};

    at::Tensor mean(const Batch& batch) const {
        const WeightedLoss loss = weighted_squares(model)(batch);
        return loss.sum / loss.weight.value();
    }
    void step() {
        optimizer.step();
        optimizer.zero_grad();
    }
    void whole_step(const Batch& batch) {
        mean(batch).backward();
        step();
    }
    Named values() const { return values_of(parameters_of(model)); }
};

struct ByLibrary {
    std::shared_ptr<TanhMlp> model = make_mlp(1);
    Parameters parameters = parameters_of(model);
    Sgd optimizer{{{.parameters = parameters}}, {.learning_rate = rate}};
    Accumulator accumulator{parameters, optimizer, {.plan = {micro_batch}}};

    StepReport step(const Batch& batch) { return accumulator.step(batch, weighted_squares(model)); }
    Named values() const { return values_of(parameters); }
};

void expect_caught(const ByHand& mistake, const ByHand& oracle, const ByLibrary& library) {
    EXPECT_GT(largest_difference(mistake.values(), oracle.values()), wrong);
    expect_agree(library.values(), oracle.values(), right);
}

TEST(ClassicMistakes, TheLossIsNotDivided) {
    const Batch batch = ragged_batch(1);
    ByHand mistake, oracle;
    ByLibrary library;
    for (const Batch& micro : cut(batch, micro_batch)) mistake.mean(micro).backward();  // 4 means: 4 times too much
    mistake.step();
    oracle.whole_step(batch);
    library.step(batch);
    expect_caught(mistake, oracle, library);
}

TEST(ClassicMistakes, TheMeanOfMeansWithRaggedTokens) {
    const Batch batch = ragged_batch(1);
    ByHand mistake, oracle;
    ByLibrary library;
    const std::vector<Batch> parts = cut(batch, micro_batch);
    for (const Batch& micro : parts) (mistake.mean(micro) / static_cast<double>(parts.size())).backward();
    mistake.step();
    oracle.whole_step(batch);
    const StepReport report = library.step(batch);
    expect_caught(mistake, oracle, library);
    // The reported loss makes the same mistake in many a loop.
    double mean_of_means = 0;
    for (const Batch& micro : parts) mean_of_means += ByHand().mean(micro).item<double>() / 4;
    const double loss = ByHand().mean(batch).item<double>();
    EXPECT_GT(std::abs(mean_of_means / loss - 1), wrong);
    EXPECT_NEAR(report.loss / loss, 1, right);
}

TEST(ClassicMistakes, SamplesCountAsIfTheyWereTokens) {
    const Batch batch = ragged_batch(1);
    ByHand mistake, oracle;
    ByLibrary library;
    for (const Batch& micro : cut(batch, micro_batch)) {
        (mistake.mean(micro) * (static_cast<double>(micro.size()) / samples)).backward();
    }
    mistake.step();
    oracle.whole_step(batch);
    library.step(batch);
    expect_caught(mistake, oracle, library);
}

TEST(ClassicMistakes, GradientsAreNotCleared) {
    ByHand mistake, oracle;
    ByLibrary library;
    for (std::uint64_t seed : {1, 2, 3}) {
        const Batch batch = ragged_batch(seed);
        mistake.mean(batch).backward();
        mistake.optimizer.step();  // and no zero_grad()
        oracle.whole_step(batch);
        library.step(batch);
    }
    expect_caught(mistake, oracle, library);
    // Left there by someone else, they are an error, before anything is added to them.
    weighted_squares(library.model)(ragged_batch(4)).sum.backward();
    expect_usage_error({"first.weight"}, [&] { library.step(ragged_batch(4)); });
    expect_agree(library.values(), oracle.values(), right);
}

TEST(ClassicMistakes, TheLastWindowIsDropped) {
    // 50 samples in batches of 16: three are full, the fourth has 2 samples, and a loop that steps on every
    // 16th sample never sees them through.
    const Batch data = ragged_batch(1);
    ByHand mistake, oracle;
    ByLibrary library;
    std::int64_t seen = 0;
    for (const Batch& micro : cut(data, 4)) {
        weighted_squares(mistake.model)(micro).sum.backward();
        seen += micro.size();
        if (seen % 16 != 0) continue;
        const double weight = data.slice(seen - 16, seen).fields[2].sum().item<double>();
        for (const Parameter& p : parameters_of(mistake.model)) p.tensor.mutable_grad().div_(weight);
        mistake.step();
    }
    library.accumulator.set_plan({4});
    for (const Batch& batch : cut(data, 16)) {
        oracle.whole_step(batch);
        EXPECT_TRUE(library.step(batch).applied);
    }
    expect_caught(mistake, oracle, library);
}

TEST(ClassicMistakes, TheLastWindowOfARunIsNotDroppedEither) {
    ByLibrary library;
    const TensorDataset dataset(ragged_batch(1));
    Trainer trainer(library.accumulator, dataset, weighted_squares(library.model),
                    {.batch = 16, .length = {samples, Unit::samples}});
    TrainerReport last;
    Named before;
    while (!trainer.done()) {
        before = library.values();
        last = trainer.step();
    }
    EXPECT_EQ(last.samples, 2);
    EXPECT_TRUE(last.step.applied);
    EXPECT_GT(largest_difference(library.values(), before), 1e-6);  // two samples have moved the parameters
    EXPECT_EQ(trainer.progress().samples, samples);
}

TEST(ClassicMistakes, AWindowThatIsNotFinishedIsNotForgotten) {
    ByLibrary library;
    library.accumulator.begin();
    library.accumulator.add(weighted_squares(library.model)(ragged_batch(1)));
    const Named before = library.values();
    expect_usage_error({"finish"}, [&] { library.accumulator.apply(); });
    expect_same_bits(library.values(), before);
    library.accumulator.discard("");
    library.accumulator.begin();
    library.accumulator.add(weighted_squares(library.model)(ragged_batch(1)));
    expect_usage_error({"finish()"}, [&] { library.accumulator.begin(); });
}

constexpr std::int64_t schedule_steps = 8;

/// From `rate` to 0 over 8 steps; `calls` is the count of the hand-written scheduler.
double decayed(std::int64_t calls) {
    return rate * std::max(0.0, 1 - static_cast<double>(calls) / static_cast<double>(schedule_steps));
}

void set_rate(ByHand& by_hand, double value) {
    for (auto& group : by_hand.optimizer.param_groups()) group.options().set_lr(value);
}

TEST(ClassicMistakes, TheSchedulerIsSteppedPerMicroBatch) {
    // One batch again and again, so that the order of the samples is no part of the comparison.
    const Batch data = ragged_batch(1);
    ByHand mistake, oracle;
    ByLibrary library;
    std::int64_t calls = 0;
    for (std::int64_t step = 0; step < schedule_steps; ++step) {
        set_rate(mistake, decayed(calls));
        set_rate(oracle, decayed(step));
        mistake.whole_step(data);
        oracle.whole_step(data);
        calls += 4;  // scheduler.step() inside the loop over the micro-batches
    }
    const TensorDataset dataset(data);
    const Schedule schedule{.shape = ScheduleShape::linear, .peak = rate, .length = {schedule_steps, Unit::steps}};
    Trainer trainer(library.accumulator, dataset, weighted_squares(library.model),
                    {.batch = samples, .length = {schedule_steps, Unit::steps}, .schedule = schedule});
    for (std::int64_t step = 0; !trainer.done(); ++step) {
        const StepReport report = trainer.step().step;
        EXPECT_EQ(report.micro_batches, 4);
        EXPECT_NEAR(report.learning_rate, decayed(step), 1e-16);  // one rounding of a number below 0.05
    }
    expect_caught(mistake, oracle, library);
}

TEST(ClassicMistakes, TheGradientIsClippedPerMicroBatch) {
    const Batch batch = ragged_batch(1);
    ByHand mistake, oracle;
    const auto clip = [](ByHand& by_hand) {
        std::vector<at::Tensor> gradients;
        for (const Parameter& p : parameters_of(by_hand.model)) gradients.push_back(p.tensor.grad());
        double squares = 0;
        for (const at::Tensor& g : gradients) squares += g.square().sum().item<double>();
        const double scale = std::min(1.0, 0.5 / (std::sqrt(squares) + 1e-6));  // as clip_grad_norm_
        for (const at::Tensor& g : gradients) g.mul_(scale);
    };
    const double weight = batch.fields[2].sum().item<double>();
    for (const Batch& micro : cut(batch, micro_batch)) {
        (weighted_squares(mistake.model)(micro).sum / weight).backward();
        clip(mistake);
    }
    mistake.step();
    oracle.mean(batch).backward();
    clip(oracle);
    oracle.step();
    ByLibrary library;
    Accumulator clipping(library.parameters, library.optimizer, {.plan = {micro_batch}, .clip_norm = 0.5});
    clipping.step(batch, weighted_squares(library.model));
    expect_agree(library.values(), oracle.values(), right);
    // Clipped sums point elsewhere: less far off than the other mistakes, and still 1e8 times the bound.
    EXPECT_GT(largest_difference(mistake.values(), oracle.values()), 1e-4);
}

}  // namespace
}  // namespace microbatch
