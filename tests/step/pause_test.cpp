// A batch that is left between two of its micro-batches and gone on with, here or elsewhere, is the same batch.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <stdexcept>

#include "support/errors.h"
#include "support/training.h"

namespace microbatch {
namespace {

using namespace test;

constexpr double nan_value = std::numeric_limits<double>::quiet_NaN();

/// Pauses when it has been asked so often; 0: never.
struct Pause {
    std::shared_ptr<int> countdown = std::make_shared<int>(0);

    void after(int times) const { *countdown = times; }
    std::function<bool()> ask() const {
        return [countdown = countdown] { return *countdown > 0 && --*countdown == 0; };
    }
};

/// A run whose batches can be left.
struct Pausing {
    Pause pause;
    TrainingOptions how;
    std::unique_ptr<Training> run;

    explicit Pausing(TrainingOptions options) : how(std::move(options)) {
        how.trainer.pause = pause.ask();
        run = std::make_unique<Training>(how);
    }

    void go_elsewhere() { run = Training::from(how, run->taken_apart()); }
};

struct Case {
    TrainingOptions how;
    int micro_batches;
    int steps = 3;
};

Case gpt_case() {
    TrainingOptions how{.model = "gpt", .plan = {.micro_batch = 2}};
    how.trainer.noise_every = 1;
    return {how, 4};  // 2, 2, 2 and 1
}

Case resnet_case() {
    TrainingOptions how{.model = "resnet", .optimizer = "sgd"};
    how.trainer.noise_every = 2;
    return {how, 3};  // 3, 3 and 1
}

Case mlp_case() {
    TrainingOptions how{.optimizer = "torch adamw", .plan = {.micro_batch = 1}};
    how.trainer.noise_every = 1;
    return {how, 7};
}

/// With snapshots, and a guard that refuses the batches of two steps and makes the run go back at the next.
Case recovering_case() {
    TrainingOptions how;
    how.trainer.guard = SpikeGuardOptions{.window = 6, .least = 4, .most_refused = 2};
    how.trainer.recovery = RecoveryOptions{.every = 2, .margin = 1, .warmup = 2, .mend = 2};
    how.trainer.noise_every = 1;
    how.spikes = {7, 8, 9};
    return {how, 3, 13};
}

std::vector<Seen> undisturbed(const Case& what) {
    Training run(what.how);
    std::vector<Seen> steps;
    for (int i = 0; i < what.steps; ++i) steps.push_back(see_step(run));
    return steps;
}

// Every batch of the run, left after `left` of its micro-batches.
void expect_pausing_changes_nothing(const Case& what, bool elsewhere) {
    const std::vector<Seen> wanted = undisturbed(what);
    for (int left = 1; left < what.micro_batches; ++left) {
        SCOPED_TRACE(::testing::Message() << "left after micro-batch " << left);
        Pausing pausing(what.how);
        for (const Seen& one : wanted) {
            pausing.pause.after(left);
            const Progress before = pausing.run->trainer().progress();
            const TrainerReport half = pausing.run->step();
            EXPECT_TRUE(half.paused);
            EXPECT_FALSE(half.step.applied);
            EXPECT_EQ(half.progress, before);
            EXPECT_EQ(pausing.run->trainer().progress(), before);
            if (elsewhere) pausing.go_elsewhere();
            const Seen whole = see_step(*pausing.run);
            ASSERT_NO_FATAL_FAILURE(expect_same(whole, one));
            EXPECT_GE(whole.report.seconds, half.seconds);
        }
    }
}

TEST(Pause, ABatchThatIsLeftAndGoneOnWithHasTheBitsOfOneThatIsNot) {
    for (const Case& what : {gpt_case(), resnet_case(), mlp_case(), recovering_case()}) {
        SCOPED_TRACE(what.how.model);
        expect_pausing_changes_nothing(what, false);
    }
}

TEST(Pause, ABatchThatIsGoneOnWithElsewhereHasThemToo) {
    for (const Case& what : {gpt_case(), resnet_case(), mlp_case(), recovering_case()}) {
        SCOPED_TRACE(what.how.model);
        expect_pausing_changes_nothing(what, true);
    }
}

TEST(Pause, ABatchThatIsLeftAfterEveryMicroBatchEndsAllTheSame) {
    for (const bool elsewhere : {false, true}) {
        for (const Case& what : {gpt_case(), resnet_case(), mlp_case()}) {
            const std::vector<Seen> wanted = undisturbed(what);
            Pausing pausing(what.how);
            for (const Seen& one : wanted) {
                for (int left = 1; left < what.micro_batches; ++left) {
                    pausing.pause.after(1);
                    ASSERT_TRUE(pausing.run->step().paused);
                    if (elsewhere) pausing.go_elsewhere();
                }
                pausing.pause.after(1);  // not asked after the last
                expect_same(see_step(*pausing.run), one);
            }
        }
    }
}

TEST(Pause, ABatchOfOneMicroBatchIsNotLeft) {
    TrainingOptions how;
    how.plan = {};
    Pausing pausing(how);
    pausing.pause.after(1);
    EXPECT_TRUE(pausing.run->step().step.applied);
}

TEST(Pause, WhatIsToBeSaidOfABatchIsSaidWhenItEnds) {
    TrainingOptions how;
    how.trainer.guard = SpikeGuardOptions{};
    how.trainer.recovery = RecoveryOptions{.memory_bytes = 0};  // and no folder
    Pausing pausing(how);
    for (int left = 0; left < 2; ++left) {
        pausing.pause.after(1);
        ASSERT_TRUE(pausing.run->step().paused);
    }
    EXPECT_NE(pausing.run->step().warning.find("no snapshot"), std::string::npos);
    EXPECT_EQ(pausing.run->step().warning, "");
}

TEST(Pause, TheStateWithoutTheOpenBatchIsThatOfBeforeIt) {
    for (const Case& what : {gpt_case(), resnet_case(), mlp_case()}) {
        const std::vector<Seen> wanted = undisturbed(what);
        Pausing pausing(what.how);
        for (const Seen& one : wanted) {
            pausing.pause.after(2);
            EXPECT_TRUE(pausing.run->step().paused);
            TrainerState state = pausing.run->taken_apart();
            ASSERT_TRUE(state.open);
            drop_open_batch(state);
            EXPECT_FALSE(state.open);
            pausing.run = Training::from(pausing.how, state);
            EXPECT_FALSE(pausing.run->accumulator().is_paused());
            expect_same(see_step(*pausing.run), one);
        }
    }
}

/// The mean gradient that a batch of 7 samples gives before the update, gone on with in micro-batches of `rest`.
struct Gradients {
    Gathered gathered;
    Named mean;
};

Gradients gather_in_two(std::int64_t first, std::int64_t rest) {
    Training run({.model = "gpt", .plan = {.micro_batch = first}});
    run.job().model->eval();  // without dropout: masks are drawn micro-batch by micro-batch
    Accumulator& accumulator = run.accumulator();
    at::manual_seed(5);
    const Batch batch = run.job().make_batch(7);
    if (first != rest) {
        accumulator.gather(batch, run.job().loss, {.pause = [] { return true; }});
        EXPECT_TRUE(accumulator.is_paused());
        accumulator.set_plan({.micro_batch = rest});
    }
    const Gathered gathered = accumulator.gather(batch, run.job().loss);
    Gradients result{gathered, gradients_of(run.job().parameters, gathered.weight)};
    accumulator.discard("seen");
    return result;
}

TEST(Pause, WithAnotherMicroBatchForTheRestTheBatchIsTheSameToRounding) {
    const Gradients wanted = gather_in_two(3, 3);
    EXPECT_EQ(wanted.gathered.weight, 28.0);  // 7 samples of 4 tokens
    for (const std::int64_t rest : {1, 2, 4, 7, 50}) {
        const Gradients found = gather_in_two(3, rest);
        EXPECT_EQ(found.gathered.weight, 28.0);
        EXPECT_EQ(found.gathered.micro_batches, 1 + micro_batch_count(4, rest));
        // A gradient is 28 tokens' parts, summed in another order: each part and each sum is off by at most one
        // rounding of 6e-8 of fp32, and the parts themselves come out of some 16 products and sums. 28 * 16 * 6e-8
        // is 2.7e-5.
        expect_agree(found.mean, wanted.mean, 2.7e-5);
        EXPECT_NEAR(found.gathered.loss() / wanted.gathered.loss(), 1.0, 2.7e-5);
    }
}

TEST(Pause, OutOfMemoryAfterItUndoesTheWholeBatchFromBeforeIt) {
    install_budget_allocator();
    for (const bool elsewhere : {false, true}) {
        for (const char* model : {"gpt", "resnet"}) {
            SCOPED_TRACE(model);
            TrainingOptions how{.model = model, .plan = {.micro_batch = 2}},
                small{.model = model, .plan = {.micro_batch = 1}};
            Training one(small);
            const Seen wanted = see_step(one);
            Pausing pausing(how);
            pausing.pause.after(2);
            ASSERT_TRUE(pausing.run->step().paused);
            if (elsewhere) pausing.go_elsewhere();
            fail_allocation(50);
            const TrainerReport report = pausing.run->step();
            fail_allocation(0);
            EXPECT_EQ(report.step.out_of_memory, 1);
            EXPECT_EQ(report.step.micro_batches, 7);
            EXPECT_EQ(report.step.plan.micro_batch, 1);
            expect_same_bits(pausing.run->state(), wanted.state);
            EXPECT_EQ(report.step.loss, wanted.report.step.loss);
        }
    }
}

/// Forty micro-batches of one sample.
TrainingOptions forty(const char* model) {
    TrainingOptions how{.model = model, .plan = {.micro_batch = 1}};
    how.trainer.batch = 40;
    how.trainer.noise_every = 1;
    how.trainer.guard = SpikeGuardOptions{};
    how.trainer.recovery = RecoveryOptions{.every = 1};
    return how;
}

TEST(Pause, ALossThatThrowsInTheThirtySeventhMicroBatchLeavesAllAsBeforeTheStep) {
    for (const char* model : {"gpt", "resnet", "mlp"}) {
        for (const int left_after : {0, 1, 20, 36}) {
            SCOPED_TRACE(::testing::Message() << model << " left after " << left_after);
            const std::vector<Seen> wanted = undisturbed({forty(model), 40, 2});
            Pausing pausing(forty(model));
            pausing.run->step();
            const Named before = pausing.run->state();
            const Progress progress = pausing.run->trainer().progress();
            pausing.pause.after(left_after);
            if (left_after > 0) {
                EXPECT_TRUE(pausing.run->step().paused);
            }
            int calls = left_after;
            pausing.run->before_loss = [&] {
                if (++calls == 37) throw std::runtime_error("struck");
            };
            EXPECT_THROW(pausing.run->step(), std::runtime_error);
            EXPECT_EQ(calls, 37);
            pausing.run->before_loss = [] {};
            EXPECT_FALSE(pausing.run->accumulator().is_paused());
            expect_same_bits(pausing.run->state(), before);
            expect_no_gradients(pausing.run->job().parameters);
            EXPECT_EQ(pausing.run->trainer().progress(), progress);
            expect_same(see_step(*pausing.run), wanted[1]);
        }
    }
}

TEST(Pause, ABatchThatBecameSmallerThanWhatIsInIsBegunAnew) {
    TrainingOptions how{.model = "resnet", .plan = {.micro_batch = 2}};
    how.trainer.length = {7, Unit::samples};
    Pausing pausing(how);
    pausing.pause.after(3);  // 6 of 7 samples
    ASSERT_TRUE(pausing.run->step().paused);
    for (const std::int64_t samples : {5, 6}) {
        TrainingOptions shorter = pausing.how;
        shorter.trainer.length = {samples, Unit::samples};
        Training fresh(shorter);
        const auto resumed = Training::from(shorter, pausing.run->taken_apart());
        expect_same(see_step(*resumed), see_step(fresh));
        EXPECT_TRUE(resumed->trainer().done());
    }
}

TEST(Pause, ABatchThatBecameLargerIsGoneOnWith) {
    TrainingOptions how{.model = "resnet", .plan = {.micro_batch = 2}};
    how.trainer.length = {6, Unit::samples};
    Pausing pausing(how);
    pausing.pause.after(1);
    ASSERT_TRUE(pausing.run->step().paused);
    TrainingOptions longer = pausing.how;
    longer.trainer.length = {100, Unit::samples};
    Training fresh(longer);
    const auto resumed = Training::from(longer, pausing.run->taken_apart());
    expect_same(see_step(*resumed), see_step(fresh));
}

TEST(Pause, WhatIsOpenIsInTheWayOfAnotherBatchOfTheCallersOwn) {
    Pausing pausing(mlp_case().how);
    pausing.pause.after(3);
    ASSERT_TRUE(pausing.run->step().paused);
    expect_usage_error({}, [&] { pausing.run->accumulator().begin(); });
    pausing.run->accumulator().discard("left out");
    EXPECT_FALSE(pausing.run->accumulator().is_paused());
    expect_no_gradients(pausing.run->job().parameters);
}

TEST(Pause, AnUnknownLossIsCarriedOnAsItIs) {
    TrainingOptions how{.plan = {.micro_batch = 2}};
    Pausing pausing(how);
    pausing.run->job().loss = [loss = pausing.run->job().loss](const Batch& micro) {
        WeightedLoss result = loss(micro);
        result.sum = result.sum * nan_value;
        return result;
    };
    const Named before = pausing.run->state();
    pausing.pause.after(2);
    ASSERT_TRUE(pausing.run->step().paused);
    pausing.go_elsewhere();
    const TrainerReport report = pausing.run->step();
    EXPECT_EQ(report.step.reason, "loss is not finite");
    expect_same_bits(pausing.run->state(), before);
}

}  // namespace
}  // namespace microbatch
