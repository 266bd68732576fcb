// A run that diverges rolls back and continues at a lower rate with other data, a bounded number of times.
#include "microbatch/run/recovery.h"

#include <cmath>
#include <limits>
#include <map>
#include <optional>
#include <utility>

#include "microbatch/memory/budget_allocator.h"
#include "microbatch/optim/adamw.h"
#include "microbatch/run/trainer.h"
#include "support/device_memory.h"
#include "support/errors.h"
#include "support/gradients.h"
#include "support/models.h"
#include "support/states.h"
#include "support/temp_folder.h"

namespace microbatch {
namespace {

using namespace test;

constexpr double nan_value = std::numeric_limits<double>::quiet_NaN();

TrainerOptions recovering(RecoveryOptions recovery = {.every = 10, .margin = 5, .warmup = 8}) {
    return {.batch = 4,
            .length = {1000, Unit::steps},
            .guard = SpikeGuardOptions{.window = 32, .least = 20, .most_refused = 4},
            .recovery = std::move(recovery)};
}

/// A run with a snapshot every ten steps; what the parameters were after each step is kept.
struct Training {
    std::shared_ptr<TanhMlp> model = make_mlp(1);
    Parameters parameters = parameters_of(model);
    AdamW optimizer{{{.parameters = parameters}}, {.learning_rate = 0.01}};
    Accumulator accumulator{model, optimizer, {.plan = {3}}};
    TensorDataset dataset{rows()};
    Trainer trainer;
    std::map<std::int64_t, Named> after;

    explicit Training(TrainerOptions options = recovering())
        : trainer(accumulator, dataset, weighted_squares(model), std::move(options)) {
        after[0] = values_of(parameters);
    }

    // Samples of equal weight: a run that stays quiet.
    static Batch rows() {
        Batch batch = regression_batch(23, 1);
        batch.fields[2].fill_(1.0);
        return batch;
    }

    TrainerReport step() {
        TrainerReport report = trainer.step();
        after[report.progress.steps] = values_of(parameters);
        return report;
    }
    void quiet(int steps) {
        for (int i = 0; i < steps; ++i) {
            const TrainerReport report = step();
            ASSERT_TRUE(report.step.applied) << report.progress.steps << report.step.reason;
            ASSERT_EQ(report.warning, "");
        }
    }
    /// As a step that was far too long would have left them.
    void damage() const {
        const at::NoGradGuard no_grad;
        for (const Parameter& one : parameters) at::Tensor(one.tensor).mul_(1000);
    }
    /// Steps until the run goes back or is said to have diverged.
    TrainerReport until_back(int most = 5) {
        for (int i = 0; i < most; ++i) {
            TrainerReport report = step();
            EXPECT_FALSE(report.step.applied);
            if (report.rolled_back_to || report.diverged) return report;
        }
        ADD_FAILURE() << "the run did not go back";
        return {};
    }
};

TEST(Recovery, RestoresTheBitsOfASnapshotAndContinues) {
    Training run;
    run.quiet(47);
    run.damage();
    const TrainerReport report = run.until_back();
    EXPECT_FALSE(report.diverged);
    EXPECT_EQ(report.progress.steps, 52);
    EXPECT_EQ(report.rolled_back_to, 40);
    EXPECT_EQ(report.step.reason.find("loss of "), 0u) << report.step.reason;
    expect_same_bits(values_of(run.parameters), run.after[40]);
    run.quiet(60);
    EXPECT_EQ(run.trainer.progress().steps, 112);
}

TEST(Recovery, TheOptimizerIsThatOfBeforeToo) {
    Training run(recovering({.every = 10, .margin = 5, .rate_factor = 1.0, .warmup = 0})), twin;
    run.quiet(47);
    run.damage();
    run.until_back();
    twin.quiet(40);
    expect_same(state_of(run.optimizer), state_of(twin.optimizer));
}

TEST(Recovery, ASnapshotThatMayBeCorruptedIsSkipped) {
    Training run;
    run.quiet(49);
    run.damage();
    run.step();  // before the next one a snapshot is due
    const TrainerReport report = run.until_back();
    EXPECT_EQ(report.rolled_back_to, 40);
    expect_same_bits(values_of(run.parameters), run.after[40]);
}

TEST(Recovery, TheRateThatDivergedIsNotGivenBack) {
    Training run(recovering({.every = 10, .margin = 5, .warmup = 8}));
    run.quiet(47);
    for (const double limit : {0.5, 0.25, 0.125}) {
        run.damage();
        run.until_back();
        for (int i = 1; i <= 70; ++i) {
            EXPECT_DOUBLE_EQ(run.step().step.learning_rate, 0.01 * limit * std::min(1.0, i / 8.0)) << i;
        }
    }
}

TEST(Recovery, ARunWhoseRollBacksAreForgottenHasItsRateAndAllOfThemAgain) {
    Training first(recovering({.most = 1, .every = 10, .margin = 5, .warmup = 8}));
    first.quiet(47);
    first.damage();
    ASSERT_TRUE(first.until_back().rolled_back_to);
    first.quiet(40);
    StateDict state = state_of(first.trainer);
    state.own();
    forget_roll_backs(state);
    Training second(recovering({.most = 1, .every = 10, .margin = 5, .warmup = 8}));
    load(second.trainer, StateReader(state));
    EXPECT_DOUBLE_EQ(second.step().step.learning_rate, 0.01);
    second.damage();
    EXPECT_FALSE(second.until_back().diverged);
}

TEST(Recovery, TheLimitIsByTheRateAtWhichTheRunWasLastCalm) {
    // The rate rises on, while steps are refused and with every step that is applied.
    TrainerOptions options = recovering({.every = 10, .margin = 5, .warmup = 1});
    options.schedule = Schedule{
        .shape = ScheduleShape::constant, .peak = 0.01, .warmup = {1000, Unit::steps}, .length = {2000, Unit::steps}};
    Training run(options);
    run.quiet(46);
    const double calm = run.step().step.learning_rate;
    run.damage();
    run.until_back();
    for (int i = 0; i < 100; ++i) EXPECT_DOUBLE_EQ(run.step().step.learning_rate, 0.5 * calm) << i;
}

TEST(Recovery, AScheduleThatFallsBelowTheLimitApplies) {
    TrainerOptions options = recovering({.every = 10, .margin = 5, .warmup = 1});
    options.schedule = Schedule{.shape = ScheduleShape::linear, .peak = 0.01, .length = {120, Unit::steps}};
    Training run(options);
    run.quiet(46);
    const double calm = run.step().step.learning_rate;
    run.damage();
    run.until_back();
    for (int i = 52; i < 119; ++i) {
        EXPECT_DOUBLE_EQ(run.step().step.learning_rate, std::min(0.5 * calm, 0.01 * (1 - i / 120.0))) << i;
    }
}

TEST(Recovery, SnapshotsInMemoryAreReclaimedBeforeTheMicroBatchIsReduced) {
    install_budget_allocator();
    const TempFolder folder;
    for (const std::filesystem::path& place : {folder.path(), std::filesystem::path()}) {
        Training run(recovering({.every = 10, .margin = 5, .warmup = 8, .folder = place}));
        run.quiet(27);
        test::reset_peak_memory();
        const std::int64_t snapshots = run.step().snapshot_bytes;
        EXPECT_GT(snapshots, 0);
        {
            const test::BudgetScope tight(test::memory_use().peak_bytes - snapshots / 2);
            const TrainerReport report = run.step();
            EXPECT_TRUE(report.step.applied);
            EXPECT_EQ(report.step.out_of_memory, 0);
            EXPECT_EQ(report.step.plan.micro_batch, 3);
        }
        EXPECT_EQ(run.step().snapshot_bytes, 0);
        run.damage();
        const TrainerReport report = run.until_back();
        EXPECT_EQ(report.rolled_back_to.has_value(), !place.empty());
        if (!place.empty()) expect_same_bits(values_of(run.parameters), run.after[*report.rolled_back_to]);
    }
}

TEST(Recovery, ASnapshotThatIsStillBeingWrittenDownCounts) {
    install_budget_allocator();
    std::optional<StateDict> written;
    TrainerOptions options = recovering();
    int asked = 0;
    options.reclaimers = {{[&] {
        ++asked;
        return std::exchange(written, std::nullopt).has_value();
    }}};
    Training run(options);
    run.quiet(35);
    const std::int64_t two = run.step().snapshot_bytes;
    written = state_of(run.trainer);
    run.quiet(10);  // one of the two is left out, and held
    EXPECT_EQ(run.step().snapshot_bytes, two + two / 2);
    EXPECT_EQ(asked, 0);
    written.reset();
    EXPECT_EQ(run.step().snapshot_bytes, two);
    // Without room for a third, who holds it is asked for it, and nothing else changes.
    written = state_of(run.trainer);
    run.quiet(2);
    ASSERT_EQ(run.trainer.progress().steps % 10, 0);
    const test::BudgetScope tight(test::memory_use().live_bytes + two / 4);
    const TrainerReport report = run.trainer.step();
    EXPECT_GE(asked, 1);
    EXPECT_FALSE(written);
    EXPECT_EQ(report.warning, "");
    EXPECT_EQ(report.snapshot_bytes, two);
}

TEST(Recovery, EndsAfterSoManyTimesWithTheLastGoodWeights) {
    for (const std::int64_t most : {0, 1, 3}) {
        Training run(recovering({.most = most, .every = 10, .margin = 5, .warmup = 8}));
        run.quiet(47);
        run.dataset.rows().fields[1].fill_(nan_value);
        for (std::int64_t i = 0; i < most; ++i) EXPECT_FALSE(run.until_back().diverged);
        const TrainerReport report = run.until_back();
        EXPECT_TRUE(report.diverged);
        EXPECT_EQ(report.rolled_back_to, 40);
        EXPECT_EQ(report.progress.steps, 47 + 5 * (most + 1));
        expect_same_bits(values_of(run.parameters), run.after[40]);
    }
}

TEST(Recovery, ARunWithoutAnAppliedStepCannotBeRolledBack) {
    Training run;
    run.dataset.rows().fields[1].fill_(nan_value);
    const TrainerReport report = run.until_back();
    EXPECT_TRUE(report.diverged);
    EXPECT_FALSE(report.rolled_back_to);
}

TEST(Recovery, SnapshotsThatDoNotFitTheMemoryAreFiles) {
    const TempFolder folder;
    {
        Training run(recovering({.every = 10, .margin = 5, .warmup = 8, .memory_bytes = 100, .folder = folder.path()})),
            twin;
        run.quiet(46);
        EXPECT_EQ(run.step().snapshot_bytes, 0);
        EXPECT_FALSE(std::filesystem::is_empty(folder.path()));
        run.damage();
        EXPECT_EQ(run.until_back().rolled_back_to, 40);
        expect_same_bits(values_of(run.parameters), run.after[40]);
        twin.quiet(46);
        EXPECT_GT(twin.step().snapshot_bytes, 0);
        twin.damage();
        twin.until_back();
        for (int i = 0; i < 20; ++i) {
            run.step();
            twin.step();
        }
        expect_same_bits(values_of(run.parameters), values_of(twin.parameters));
    }
    EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
}

TEST(Recovery, RollsBackFromFilesWithinTheBudget) {
    install_budget_allocator();
    const TempFolder folder;
    const auto model = make_mlp(1, at::kFloat, 64, 1024, 64);  // half a MiB of parameters, and twice that of state
    const Parameters parameters = parameters_of(model);
    AdamW optimizer({{.parameters = parameters}}, {.learning_rate = 1e-4});
    Accumulator accumulator(model, optimizer, {.plan = {1}});
    Batch rows = regression_batch(23, 1, at::kFloat, 64, 64);
    rows.fields[2].fill_(1.0);
    const TensorDataset dataset(rows);
    TrainerOptions options =
        recovering({.every = 10, .margin = 5, .warmup = 8, .memory_bytes = 0, .folder = folder.path()});
    Trainer trainer(accumulator, dataset, weighted_squares(model), options);
    for (int i = 0; i < 37; ++i) ASSERT_TRUE(trainer.step().step.applied);
    test::reset_peak_memory();
    ASSERT_TRUE(trainer.step().step.applied);
    const test::BudgetScope tight(test::memory_use().peak_bytes);
    {
        const at::NoGradGuard no_grad;
        for (const Parameter& one : parameters) at::Tensor(one.tensor).mul_(1000);
    }
    TrainerReport report;
    for (int i = 0; i < 5; ++i) report = trainer.step();
    EXPECT_EQ(report.rolled_back_to, 30) << report.warning;
    EXPECT_FALSE(report.diverged);
    EXPECT_TRUE(trainer.step().step.applied);
}

TEST(Recovery, AMissingSnapshotEndsTheRunWithAWarning) {
    const TempFolder folder;
    Training run(recovering({.every = 10, .margin = 5, .warmup = 8, .memory_bytes = 0, .folder = folder.path()}));
    run.quiet(47);
    for (const auto& file : std::filesystem::directory_iterator(folder.path())) std::filesystem::resize_file(file, 100);
    run.damage();
    const TrainerReport report = run.until_back();
    EXPECT_TRUE(report.diverged);
    EXPECT_FALSE(report.rolled_back_to);
    EXPECT_NE(report.warning.find("could not be rolled back"), std::string::npos) << report.warning;
}

TEST(Recovery, ASnapshotWhoseFileWasRemovedIsStillRead) {
    const TempFolder folder;
    Training run(recovering({.every = 10, .margin = 5, .warmup = 8, .memory_bytes = 0, .folder = folder.path()}));
    run.quiet(47);
    for (const auto& file : std::filesystem::directory_iterator(folder.path())) std::filesystem::remove(file);
    run.damage();
    EXPECT_EQ(run.until_back().rolled_back_to, 40);
    expect_same_bits(values_of(run.parameters), run.after[40]);
}

TEST(Recovery, GoingBackBeforeTheBatchBecameSmallerBringsNoGuardOfTheLargerOne) {
    TrainerOptions options = recovering({.every = 30, .margin = 5, .warmup = 0});
    options.batches = parse_batch_schedule("23 at 0, 1 at 45 steps");
    Training run(options);
    run.quiet(47);
    run.model->first->bias.detach().fill_(nan_value);
    const TrainerReport report = run.until_back();
    EXPECT_EQ(report.rolled_back_to, 30);
    run.quiet(40);
}

TEST(Recovery, IfNoSnapshotCanBeTakenTheRunWarnsOnceAndContinues) {
    const TempFolder folder;
    for (const std::filesystem::path& place : {std::filesystem::path(), folder.path() / "nowhere"}) {
        Training run(recovering({.every = 10, .memory_bytes = 0, .folder = place}));
        EXPECT_NE(run.step().warning.find("no more snapshots"), std::string::npos);
        run.quiet(46);
        run.damage();
        const TrainerReport report = run.until_back();
        EXPECT_TRUE(report.diverged);
        EXPECT_FALSE(report.rolled_back_to);
    }
}

TEST(Recovery, RefusesInvalidOptions) {
    const auto refused = [](const char* word, RecoveryOptions options) {
        expect_usage_error({word}, [&] { Training(recovering(options)); });
    };
    refused("most", {.most = -1});
    refused("every", {.every = 0});
    refused("margin", {.margin = -1});
    refused("rate_factor", {.rate_factor = 0.0});
    refused("rate_factor", {.rate_factor = 1.5});
    refused("rate_factor", {.rate_factor = nan_value});
    refused("warmup", {.warmup = -1});
    refused("memory", {.memory_bytes = -1});
    expect_usage_error({"guard"}, [] {
        Training(TrainerOptions{.batch = 4, .length = {1, Unit::steps}, .recovery = RecoveryOptions{}});
    });
}

}  // namespace
}  // namespace microbatch
