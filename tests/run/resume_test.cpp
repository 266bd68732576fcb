// A run that is saved after any step and resumed elsewhere makes the same steps, bit for bit.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "support/states.h"
#include "support/temp_folder.h"
#include "support/training.h"

namespace microbatch {
namespace {

using namespace test;

/// The steps of an uninterrupted run, and the state before each of them.
struct Undisturbed {
    std::vector<Seen> steps;
    std::vector<StateDict> before;

    Undisturbed(const TrainingOptions& how, std::size_t count) {
        Training run(how);
        for (std::size_t i = 0; i < count; ++i) {
            before.push_back(run.taken_apart());
            steps.push_back(see_step(run));
        }
        before.push_back(run.taken_apart());
    }

    int refused() const {
        return static_cast<int>(std::count_if(steps.begin(), steps.end(), [](const Seen& seen) {
            return !seen.report.step.applied && !seen.report.rolled_back_to;
        }));
    }
    int times_back() const {
        return static_cast<int>(
            std::count_if(steps.begin(), steps.end(), [](const Seen& seen) { return seen.report.rolled_back_to; }));
    }
};

/// From every step to the end; and saved and loaded again after each.
void expect_resumes(const TrainingOptions& how, const Undisturbed& run) {
    for (std::size_t from = 0; from < run.steps.size(); ++from) {
        SCOPED_TRACE(::testing::Message() << "from step " << from);
        const auto resumed = Training::from(how, run.before[from]);
        for (std::size_t i = from; i < run.steps.size(); ++i) {
            SCOPED_TRACE(::testing::Message() << "at step " << i);
            ASSERT_NO_FATAL_FAILURE(expect_same(see_step(*resumed), run.steps[i]));
            if (::testing::Test::HasFailure()) return;
        }
    }
    auto chain = Training::from(how, run.before[0]);
    for (const Seen& wanted : run.steps) {
        ASSERT_NO_FATAL_FAILURE(expect_same(see_step(*chain), wanted));
        chain = Training::from(how, chain->taken_apart());
    }
}

void expect_resumes(const TrainingOptions& how, std::size_t steps) {
    expect_resumes(how, Undisturbed(how, steps));
}

const Schedule cosine{
    .shape = ScheduleShape::cosine, .peak = 0.02, .warmup = {3, Unit::steps}, .length = {60, Unit::steps}};

/// Whose guard has seen enough after 20 steps.
TrainingOptions guarded() {
    TrainingOptions how;
    how.trainer.guard = SpikeGuardOptions{.window = 24, .least = 20, .most_refused = 3};
    return how;
}

/// Which goes back at the fourth step of a spike.
TrainingOptions recovering(RecoveryOptions recovery = {.every = 8, .margin = 4, .warmup = 3}) {
    TrainingOptions how = guarded();
    how.trainer.recovery = std::move(recovery);
    how.spikes = {30, 31, 32, 33};
    return how;
}

TEST(Resume, AGptWithDropoutMakesTheSameSteps) {
    TrainingOptions how{.model = "gpt"};
    how.trainer.noise_every = 2;
    how.trainer.schedule = cosine;
    expect_resumes(how, 8);
}

TEST(Resume, AResNetWithBatchNormMakesTheSameSteps) {
    TrainingOptions how{.model = "resnet", .optimizer = "sgd"};
    how.trainer.noise_every = 3;
    expect_resumes(how, 6);
}

TEST(Resume, EveryOptimizerContinuesWithItsState) {
    for (const char* optimizer : {"adamw", "sgd", "torch adamw", "torch sgd"}) {
        for (const bool scheduled : {false, true}) {
            SCOPED_TRACE(::testing::Message() << optimizer << (scheduled ? ", scheduled" : ""));
            TrainingOptions how{.optimizer = optimizer};
            if (scheduled) how.trainer.schedule = cosine;
            expect_resumes(how, 10);
        }
    }
}

TEST(Resume, ARateThatTheCallerHasSetHoldsOn) {
    for (const char* optimizer : {"adamw", "torch sgd"}) {
        const TrainingOptions how{.optimizer = optimizer};
        Training run(how);
        run.step();
        run.optimizer().set_learning_rate(0.125);
        const StateDict state = run.taken_apart();
        const auto resumed = Training::from(how, state);
        for (int i = 0; i < 3; ++i) {
            const Seen wanted = see_step(run);
            EXPECT_EQ(wanted.report.step.learning_rate, 0.125);
            ASSERT_NO_FATAL_FAILURE(expect_same(see_step(*resumed), wanted));
        }
    }
}

TEST(Resume, EveryMicroBatchOfEveryBatchResumesAtItsPositionInTheData) {
    for (const std::int64_t micro_batch : {1, 2, 5, 23, 50}) {
        TrainingOptions how{.plan = {.micro_batch = micro_batch}};
        how.trainer.batch = 9;
        how.trainer.seed = static_cast<std::uint64_t>(micro_batch);
        how.trainer.noise_every = 1;
        expect_resumes(how, 6);  // beyond the second epoch of 23 samples
    }
}

TEST(Resume, ABatchThatChangesOverTheRunChangesWhereItWould) {
    TrainingOptions how = guarded();
    how.trainer.batches = parse_batch_schedule("3 at 0, 8 at 25 steps, 4 at 50 steps");
    how.trainer.rate_rule = RateRule::sqrt;
    how.trainer.schedule = cosine;
    how.trainer.noise_every = 2;
    how.spikes = {46, 72, 80};  // before and after the guard's statistics are reset
    const Undisturbed run(how, 82);
    EXPECT_EQ(run.refused(), 3);
    expect_resumes(how, run);
}

TEST(Resume, ALastSmallerBatchEndsTheRun) {
    TrainingOptions how;
    how.trainer.length = {24, Unit::samples};
    const Undisturbed run(how, 4);
    EXPECT_EQ(run.steps.back().report.samples, 3);
    expect_resumes(how, run);
    EXPECT_TRUE(Training::from(how, run.before.back())->trainer().done());
    how.trainer.length = {10, Unit::steps};  // a longer one is allowed
    EXPECT_FALSE(Training::from(how, run.before.back())->trainer().done());
}

TEST(Resume, TheGuardRefusesWhatItWouldHaveRefused) {
    TrainingOptions how = guarded();
    how.spikes = {24, 25, 33};
    const Undisturbed run(how, 40);
    EXPECT_EQ(run.refused(), 3);
    expect_resumes(how, run);
}

TEST(Resume, ARunThatDivergesRollsBackToTheSamePoint) {
    for (const bool scheduled : {false, true}) {
        TrainingOptions how = recovering();
        if (scheduled) how.trainer.schedule = cosine;
        how.trainer.noise_every = 5;
        const Undisturbed run(how, 48);
        EXPECT_EQ(run.times_back(), 1);
        expect_resumes(how, run);
    }
}

TEST(Resume, ARunThatRollsBackRepeatedlyEndsAtTheSameStep) {
    TrainingOptions how = recovering({.most = 1, .every = 8, .margin = 4, .warmup = 3});
    how.spikes = {30, 31, 32, 33, 44, 45, 46, 47};
    const Undisturbed run(how, 48);
    EXPECT_EQ(run.times_back(), 2);
    EXPECT_TRUE(run.steps.back().report.diverged);
    expect_resumes(how, run);
}

TEST(Resume, SnapshotsInFilesAreThoseOfBefore) {
    const TempFolder folder;
    TrainingOptions how = recovering({.every = 8, .margin = 4, .warmup = 3, .memory_bytes = 0});
    how.snapshots = folder.path();
    const Undisturbed run(how, 44);
    EXPECT_EQ(run.times_back(), 1);
    EXPECT_EQ(run.steps.back().report.snapshot_bytes, 0);
    expect_resumes(how, run);
}

TEST(Resume, SnapshotsMoveFromMemoryToFilesAndTheOtherWayRound) {
    const TempFolder folder;
    TrainingOptions in_memory = recovering();
    TrainingOptions in_files = recovering({.every = 8, .margin = 4, .warmup = 3, .memory_bytes = 0});
    in_memory.snapshots = in_files.snapshots = folder.path();
    const Undisturbed one(in_memory, 44), other(in_files, 44);
    for (const std::size_t from : {1U, 20U, 31U, 36U}) {
        const auto resumed = Training::from(in_files, one.before[from]);
        for (std::size_t i = from; i < 44; ++i) expect_same(see_step(*resumed), other.steps[i]);
    }
}

TEST(Resume, TheSnapshotsOfAProcessThatWasKilledAreNotInTheWay) {
    const TempFolder folder;
    TrainingOptions how = recovering({.every = 8, .margin = 4, .warmup = 3, .memory_bytes = 0});
    how.trainer.recovery->folder = folder.path();
    Training killed(how);
    for (int i = 0; i < 20; ++i) killed.step();
    ASSERT_FALSE(std::filesystem::is_empty(folder.path()));
    const StateDict state = killed.taken_apart();
    const auto resumed = Training::from(how, state);  // while their files are there
    for (int i = 0; i < 24; ++i) {
        SCOPED_TRACE(i);
        const Seen wanted = see_step(killed);
        ASSERT_NO_FATAL_FAILURE(expect_same(see_step(*resumed), wanted));
    }
}

TEST(Resume, AReducedPlanStaysReduced) {
    install_budget_allocator();
    for (const char* model : {"gpt", "resnet"}) {
        TrainingOptions how{.model = model, .plan = {.micro_batch = 4}, .out_of_memory = 1};
        const Undisturbed run(how, 4);
        EXPECT_EQ(run.steps[1].report.step.out_of_memory, 1);
        EXPECT_EQ(run.steps[3].report.step.plan.micro_batch, 2);
        for (const std::size_t from : {2U, 3U}) {
            const auto resumed = Training::from(how, run.before[from]);
            for (std::size_t i = from; i < 4; ++i) expect_same(see_step(*resumed), run.steps[i]);
        }
    }
}

TEST(Resume, AUsedTrainerResumesLikeANewOne) {
    TrainingOptions how = recovering();
    how.trainer.noise_every = 2;
    const Undisturbed run(how, 44);
    Training used(how);
    for (std::size_t i = 0; i < 40; ++i) used.step();
    for (const std::size_t from : {43U, 31U, 20U, 1U, 0U}) {
        SCOPED_TRACE(::testing::Message() << "from step " << from);
        load(used.trainer(), StateReader(run.before[from]));
        expect_same(see_step(used), run.steps[from]);
    }
}

TEST(Resume, TwoRunsOfOneStateHaveNothingInCommon) {
    for (const char* optimizer : {"adamw", "torch adamw"}) {
        TrainingOptions how = recovering();
        how.optimizer = optimizer;
        const Undisturbed run(how, 24);
        Training first(how);
        for (int i = 0; i < 20; ++i) first.step();
        const auto second = Training::from(how, state_of(first.trainer()));  // the first one's own tensors
        for (std::size_t i = 20; i < 24; ++i) {
            expect_same(see_step(first), run.steps[i]);
            expect_same(see_step(*second), run.steps[i]);
        }
    }
}

TEST(Resume, AStateThatOwnsItsTensorsIsNotChangedByTheSteps) {
    Training run(recovering());
    for (int i = 0; i < 12; ++i) run.step();
    const StateDict shared = state_of(run.trainer());
    StateDict owned = shared;
    for (const char* section : {"model/", "optimizer/", "rng/"}) owned.own(section);
    EXPECT_EQ(owned.bytes(), shared.bytes());
    EXPECT_GT(owned.bytes("recovery/"), 0);  // snapshots are shared: no step changes them
    EXPECT_EQ(owned.bytes(),
              owned.bytes("model/") + owned.bytes("optimizer/") + owned.bytes("rng/") + owned.bytes("recovery/"));
    StateDict before = shared;
    before.own();
    for (int i = 0; i < 12; ++i) run.step();
    expect_same(owned, before);
    for (const char* section : {"model/", "optimizer/"}) {  // what is not owned is
        const auto one = shared.tensors().lower_bound(section), other = before.tensors().lower_bound(section);
        EXPECT_FALSE(same_bits(one->second.get(), other->second.get())) << one->first;
    }
}

/// Asked after micro-batches: true after so many.
struct Stop {
    std::shared_ptr<int> left = std::make_shared<int>(0);

    StopToken token() const {
        return [left = left] { return --*left == 0; };
    }
};

TEST(Resume, ABatchThatIsLeftAtAnyMicroBatchOfAnyStepIsTheSameBatch) {
    const TempFolder folder;
    TrainingOptions in_files = recovering({.every = 8, .margin = 4, .warmup = 3, .memory_bytes = 0});
    in_files.snapshots = folder.path();
    TrainingOptions gpt{.model = "gpt"}, resnet{.model = "resnet", .optimizer = "torch sgd"};
    for (TrainingOptions how : {gpt, resnet, recovering(), in_files}) {
        SCOPED_TRACE(how.model);
        how.trainer.noise_every = 2;
        const std::size_t steps = how.trainer.recovery ? 44 : 4;
        const Undisturbed run(how, steps);
        EXPECT_EQ(run.times_back(), how.trainer.recovery ? 1 : 0);
        const Stop stop;
        how.trainer.stop = stop.token();
        for (const int after : {1, 2}) {  // of three
            std::unique_ptr<Training> chain = Training::from(how, run.before[0]);
            for (std::size_t i = 0; i < steps; ++i) {
                SCOPED_TRACE(::testing::Message() << "step " << i << " left after " << after);
                *stop.left = after;
                ASSERT_TRUE(chain->step().paused);
                chain = Training::from(how, chain->taken_apart());
                EXPECT_TRUE(chain->trainer().is_paused());
                ASSERT_NO_FATAL_FAILURE(expect_same(see_step(*chain), run.steps[i]));
                if (::testing::Test::HasFailure()) return;
            }
        }
    }
}

}  // namespace
}  // namespace microbatch
