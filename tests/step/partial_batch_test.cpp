// A batch that is interrupted between two micro-batches and resumed, here or in another process, is the same batch.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <limits>
#include <memory>
#include <stdexcept>
#include <utility>
#include <variant>

#include "support/device_memory.h"
#include "support/training.h"

namespace microbatch {
namespace {

using namespace test;

constexpr double nan_value = std::numeric_limits<double>::quiet_NaN();

/// Stops when it has been asked so often; 0: never.
struct Stop {
    std::shared_ptr<int> countdown = std::make_shared<int>(0);

    void after(int times) const { *countdown = times; }
    std::function<bool()> ask() const {
        return [countdown = countdown] { return *countdown > 0 && --*countdown == 0; };
    }
};

/// A run whose batches can be left.
struct Stopping {
    Stop stop;
    TrainingOptions how;
    std::unique_ptr<Training> run;

    explicit Stopping(TrainingOptions options) : how(std::move(options)) {
        how.trainer.stop = stop.ask();
        run = std::make_unique<Training>(how);
    }

    void resume_elsewhere() { run = Training::from(how, run->taken_apart()); }
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
    return {how, 3};  // 3, 2 and 2
}

Case mlp_case() {
    TrainingOptions how{.optimizer = "torch adamw", .plan = {.micro_batch = 1}};
    how.trainer.noise_every = 1;
    return {how, 7};
}

/// With snapshots, and a guard that refuses the batches of two steps and has the run rolled back at the next.
Case recovering_case() {
    TrainingOptions how;
    how.trainer.guard = SpikeGuardOptions{.window = 6, .least = 4, .most_refused = 2};
    how.trainer.recovery = RecoveryOptions{.every = 2, .margin = 1, .warmup = 2};
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
void expect_stopping_changes_nothing(const Case& what, bool elsewhere) {
    const std::vector<Seen> wanted = undisturbed(what);
    for (int left = 1; left < what.micro_batches; ++left) {
        SCOPED_TRACE(::testing::Message() << "left after micro-batch " << left);
        Stopping stopping(what.how);
        for (const Seen& one : wanted) {
            stopping.stop.after(left);
            const Progress before = stopping.run->trainer().progress();
            const TrainerReport half = stopping.run->step();
            EXPECT_TRUE(half.paused);
            EXPECT_FALSE(half.step.applied);
            EXPECT_EQ(half.progress, before);
            EXPECT_EQ(stopping.run->trainer().progress(), before);
            if (elsewhere) stopping.resume_elsewhere();
            const Seen whole = see_step(*stopping.run);
            ASSERT_NO_FATAL_FAILURE(expect_same(whole, one));
            EXPECT_GE(whole.report.seconds, half.seconds);
        }
    }
}

TEST(PartialBatches, ThatAreResumedHaveTheBitsOfBatchesThatWereNotLeft) {
    for (const Case& what : {gpt_case(), resnet_case(), mlp_case(), recovering_case()}) {
        SCOPED_TRACE(what.how.model);
        expect_stopping_changes_nothing(what, false);
    }
}

TEST(PartialBatches, ThatAreResumedElsewhereHaveThemToo) {
    for (const Case& what : {gpt_case(), resnet_case(), mlp_case(), recovering_case()}) {
        SCOPED_TRACE(what.how.model);
        expect_stopping_changes_nothing(what, true);
    }
}

TEST(PartialBatches, ThatAreLeftAfterEveryMicroBatchEndAllTheSame) {
    for (const bool elsewhere : {false, true}) {
        for (const Case& what : {gpt_case(), resnet_case(), mlp_case()}) {
            const std::vector<Seen> wanted = undisturbed(what);
            Stopping stopping(what.how);
            for (const Seen& one : wanted) {
                for (int left = 1; left < what.micro_batches; ++left) {
                    stopping.stop.after(1);
                    ASSERT_TRUE(stopping.run->step().paused);
                    if (elsewhere) stopping.resume_elsewhere();
                }
                stopping.stop.after(1);  // not asked after the last
                expect_same(see_step(*stopping.run), one);
            }
        }
    }
}

TEST(PartialBatches, AreNeverOfOneMicroBatch) {
    TrainingOptions how;
    how.plan = {};
    Stopping stopping(how);
    stopping.stop.after(1);
    EXPECT_TRUE(stopping.run->step().step.applied);
}

TEST(PartialBatches, GiveTheirWarningWhenTheyEnd) {
    TrainingOptions how;
    how.trainer.guard = SpikeGuardOptions{};
    how.trainer.recovery = RecoveryOptions{.memory_bytes = 0};  // and no folder
    Stopping stopping(how);
    for (int left = 0; left < 2; ++left) {
        stopping.stop.after(1);
        ASSERT_TRUE(stopping.run->step().paused);
    }
    EXPECT_NE(stopping.run->step().warning.find("no more snapshots"), std::string::npos);
    EXPECT_EQ(stopping.run->step().warning, "");
}

TEST(PartialBatches, HoldTheStateOfBeforeThem) {
    for (const Case& what : {gpt_case(), resnet_case(), mlp_case()}) {
        const std::vector<Seen> wanted = undisturbed(what);
        Stopping stopping(what.how);
        for (const Seen& one : wanted) {
            stopping.stop.after(2);
            EXPECT_TRUE(stopping.run->step().paused);
            StateDict state = stopping.run->taken_apart();
            ASSERT_TRUE(state.has("batch/"));
            state.move("batch/before/model/", "model/");
            state.move("batch/before/rng/", "rng/");
            state.erase("batch/");
            stopping.run = Training::from(stopping.how, state);
            EXPECT_FALSE(stopping.run->trainer().is_paused());
            expect_same(see_step(*stopping.run), one);
        }
    }
}

/// The mean gradient that a batch of 7 samples gives before the update, resumed in micro-batches of `rest`.
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
    StepOptions how;
    if (first != rest) {
        how.partial = std::get<PartialBatch>(
            accumulator.gather(TensorBatch(batch), run.job().loss, {.stop = [] { return true; }}));
        accumulator.set_plan({.micro_batch = rest});
    }
    const auto gathered = std::get<Gathered>(accumulator.gather(TensorBatch(batch), run.job().loss, std::move(how)));
    Gradients result{gathered, gradients_of(run.job().parameters, gathered.weight)};
    accumulator.discard("seen");
    return result;
}

TEST(PartialBatches, AreTheSameToRoundingWithAnotherMicroBatchForTheRest) {
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

TEST(PartialBatches, AreBegunAgainWhereTheRestRunsOutOfMemory) {
    install_budget_allocator();
    for (const bool elsewhere : {false, true}) {
        for (const char* model : {"gpt", "resnet"}) {
            SCOPED_TRACE(model);
            TrainingOptions how{.model = model, .plan = {.micro_batch = 2}},
                small{.model = model, .plan = {.micro_batch = 1}};
            Training one(small);
            const Seen wanted = see_step(one);
            Stopping stopping(how);
            stopping.stop.after(2);
            ASSERT_TRUE(stopping.run->step().paused);
            if (elsewhere) stopping.resume_elsewhere();
            test::fail_allocation(50);
            const TrainerReport report = stopping.run->step();
            test::fail_allocation(0);
            EXPECT_EQ(report.step.out_of_memory, 1);
            EXPECT_EQ(report.step.micro_batches, 7);
            EXPECT_EQ(report.step.plan.micro_batch, 1);
            expect_same_bits(stopping.run->state(), wanted.state);
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

TEST(PartialBatches, WhoseLossThrowsInTheThirtySeventhMicroBatchLeaveAllAsBeforeTheStep) {
    for (const char* model : {"gpt", "resnet", "mlp"}) {
        for (const int left_after : {0, 1, 20, 36}) {
            SCOPED_TRACE(::testing::Message() << model << " left after " << left_after);
            const std::vector<Seen> wanted = undisturbed({forty(model), 40, 2});
            Stopping stopping(forty(model));
            stopping.run->step();
            const Named before = stopping.run->state();
            const Progress progress = stopping.run->trainer().progress();
            stopping.stop.after(left_after);
            if (left_after > 0) {
                EXPECT_TRUE(stopping.run->step().paused);
            }
            int calls = left_after;
            stopping.run->before_loss = [&] {
                if (++calls == 37) throw std::runtime_error("struck");
            };
            EXPECT_THROW(stopping.run->step(), std::runtime_error);
            EXPECT_EQ(calls, 37);
            stopping.run->before_loss = [] {};
            EXPECT_FALSE(stopping.run->trainer().is_paused());
            expect_same_bits(stopping.run->state(), before);
            expect_no_gradients(stopping.run->job().parameters);
            EXPECT_EQ(stopping.run->trainer().progress(), progress);
            expect_same(see_step(*stopping.run), wanted[1]);
        }
    }
}

TEST(PartialBatches, OfARunThatIsShorterNowAreBegunAgain) {
    TrainingOptions how{.model = "resnet", .plan = {.micro_batch = 2}};
    how.trainer.length = {7, Unit::samples};
    Stopping stopping(how);
    stopping.stop.after(3);  // 6 of 7 samples
    ASSERT_TRUE(stopping.run->step().paused);
    for (const std::int64_t samples : {5, 6}) {
        TrainingOptions shorter = stopping.how;
        shorter.trainer.length = {samples, Unit::samples};
        Training fresh(shorter);
        const auto resumed = Training::from(shorter, stopping.run->taken_apart());
        expect_same(see_step(*resumed), see_step(fresh));
        EXPECT_TRUE(resumed->trainer().done());
    }
}

TEST(PartialBatches, OfARunThatIsLongerNowHaveTheBitsOfThatRun) {
    TrainingOptions how{.model = "resnet", .plan = {.micro_batch = 2}};
    how.trainer.length = {6, Unit::samples};
    Stopping stopping(how);
    stopping.stop.after(1);
    ASSERT_TRUE(stopping.run->step().paused);
    TrainingOptions longer = stopping.how;
    longer.trainer.length = {100, Unit::samples};
    Training fresh(longer);
    const auto resumed = Training::from(longer, stopping.run->taken_apart());
    expect_same(see_step(*resumed), see_step(fresh));
}

TEST(PartialBatches, AreNotInTheWayOfAnotherBatchOfTheCallersOwn) {
    const Case what = gpt_case();
    const std::vector<Seen> wanted = undisturbed(what);
    Stopping stopping(what.how);
    stopping.stop.after(3);
    ASSERT_TRUE(stopping.run->step().paused);
    expect_no_gradients(stopping.run->job().parameters);
    Accumulator& accumulator = stopping.run->accumulator();
    at::Generator generator = at::globalContext().defaultGenerator(at::kCPU);
    const at::Tensor before = generator.get_state();
    const Batch other = stopping.run->job().make_batch(3);
    accumulator.begin();
    accumulator.add(stopping.run->job().loss(other));
    accumulator.finish();
    accumulator.discard("left out");
    generator.set_state(before);
    expect_same(see_step(*stopping.run), wanted[0]);
}

TEST(PartialBatches, CarryALossThatIsNotANumberOn) {
    TrainingOptions how{.plan = {.micro_batch = 2}};
    Stopping stopping(how);
    stopping.run->job().loss = [loss = stopping.run->job().loss](const Batch& micro) {
        WeightedLoss result = loss(micro);
        result.sum = result.sum * nan_value;
        return result;
    };
    const Named before = stopping.run->state();
    stopping.stop.after(2);
    ASSERT_TRUE(stopping.run->step().paused);
    stopping.resume_elsewhere();
    const TrainerReport report = stopping.run->step();
    EXPECT_EQ(report.step.reason, "loss is not finite");
    expect_same_bits(stopping.run->state(), before);
}

}  // namespace
}  // namespace microbatch
