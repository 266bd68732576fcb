// Memory that a checkpoint takes while it is written: a step that runs out of memory reclaims it, and is the step that
// it would have been with that memory free from the start.
#include <gtest/gtest.h>

#include <string>
#include <utility>
#include <vector>

#include "microbatch/memory/budget_allocator.h"
#include "support/device_memory.h"
#include "support/rich_run.h"
#include "support/temp_folder.h"

namespace microbatch {
namespace {

using namespace test;

/// A run that measures noise in each step, and a checkpoint's copy that takes memory as long as `taken` is true.
struct BesideACopy {
    bool taken = false;
    int asked = 0;
    Training run;

    explicit BesideACopy(TrainingOptions how) : run(with_reclaimer(std::move(how))) {}

private:
    TrainingOptions with_reclaimer(TrainingOptions how) {
        how.trainer.noise_every = 1;
        const auto release = [this] {
            ++asked;
            return std::exchange(taken, false);
        };
        how.trainer.reclaimers = {{release, /*counts=*/false}};
        return how;
    }
};

class ReclaimedMemory : public ::testing::Test {
protected:
    static void SetUpTestSuite() { install_budget_allocator(); }
    ~ReclaimedMemory() override { test::fail_allocation(0); }
};

TEST_F(ReclaimedMemory, MakesTheStepThatNeverMissedItWhereverItRanOut) {
    for (const char* model : {"gpt", "norm"}) {
        for (const int before : {0, 8}) {
            TrainingOptions how = rich();
            how.model = model;
            BesideACopy undisturbed(how);
            for (int i = 0; i < before; ++i) undisturbed.run.step();
            const std::int64_t start = test::allocation_count();
            const Seen wanted = see_step(undisturbed.run);
            const std::int64_t allocations = test::allocation_count() - start;
            ASSERT_EQ(wanted.report.step.noise.has_value(), true);
            EXPECT_EQ(undisturbed.asked, 0);
            for (std::int64_t n = 1; n <= allocations && !HasFailure(); ++n) {
                SCOPED_TRACE(::testing::Message() << model << ", allocation " << n << " of " << allocations);
                BesideACopy other(how);
                for (int i = 0; i < before; ++i) other.run.step();
                other.taken = true;
                test::fail_allocation(n);
                Seen seen{other.run.trainer().step(), {}, {}};
                const bool struck = other.asked > 0;
                test::fail_allocation(0);
                if (!struck) {  // what is left is see_step's own
                    EXPECT_GT(n, 50);
                    break;
                }
                seen.state = other.run.state();
                seen.scalars = scalars_to_json(state_of(other.run.trainer()));
                expect_same(seen, wanted);
                EXPECT_EQ(other.asked, 1);
            }
        }
    }
}

TEST_F(ReclaimedMemory, IsFollowedByTheSnapshotsWhereItIsNotEnough) {
    const Job job = mlp_job({.inputs = 4, .layers = 1, .width = 5, .classes = 3}, {.micro_batch = 3}, "adamw");
    const Batch batch = job.make_batch(7);
    const std::int64_t start = test::allocation_count();
    {
        const Job same = mlp_job({.inputs = 4, .layers = 1, .width = 5, .classes = 3}, {.micro_batch = 3}, "adamw");
        same.accumulator->step(batch, same.loss);
    }
    const std::int64_t at_start = test::allocation_count();
    const Job again = mlp_job({.inputs = 4, .layers = 1, .width = 5, .classes = 3}, {.micro_batch = 3}, "adamw");
    const std::int64_t made = test::allocation_count() - at_start;
    const std::int64_t last = at_start - start - made;  // of the step: in the optimizer's
    std::vector<std::string> asked;
    const auto copy = [&] {
        if (!asked.empty()) return false;
        asked.emplace_back("copy");
        test::fail_allocation(last);
        return true;
    };
    const auto snapshots = [&] {
        asked.emplace_back("snapshots");
        return true;
    };
    const StepOptions how{.before_noise = {{copy, /*counts=*/false}}, .before_plan = {{snapshots}}};
    test::fail_allocation(last);
    const StepReport report = job.accumulator->step(batch, job.loss, how);
    EXPECT_TRUE(report.applied);
    EXPECT_EQ(report.out_of_memory, 1);
    EXPECT_EQ(report.plan.micro_batch, 3);
    EXPECT_EQ(asked, (std::vector<std::string>{"copy", "snapshots"}));
}

TEST_F(ReclaimedMemory, DoesNotKeepASignalFromStoppingTheBatchThatIsRepeated) {
    bool taken = true;
    int micro_batches = 0;
    TrainingOptions how = rich();
    how.trainer.reclaimers = {{[&] { return std::exchange(taken, false); }, /*counts=*/false}};
    how.trainer.stop = [&] { return !taken && ++micro_batches == 1; };
    Training run(how);
    test::fail_allocation(60);
    EXPECT_TRUE(run.trainer().step().paused);
    test::fail_allocation(0);
}

}  // namespace
}  // namespace microbatch
