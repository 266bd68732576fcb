// Memory that was lent to a checkpoint that is being written: a step that runs out of memory gets it back, and is the
// step that it would have been without.
#include <gtest/gtest.h>

#include <string>
#include <utility>
#include <vector>

#include "microbatch/memory/budget_allocator.h"
#include "support/rich_run.h"
#include "support/temp_folder.h"

namespace microbatch {
namespace {

using namespace test;

/// A run that measures noise in each step, and whose memory is lent as long as `lent` says.
struct Borrowed {
    bool lent = false;
    int asked = 0;
    Training run;

    explicit Borrowed(TrainingOptions how) : run(with_release(std::move(how))) {}

private:
    TrainingOptions with_release(TrainingOptions how) {
        how.trainer.noise_every = 1;
        how.trainer.release_memory = [this] {
            ++asked;
            return std::exchange(lent, false);
        };
        return how;
    }
};

class LentMemory : public ::testing::Test {
protected:
    static void SetUpTestSuite() { install_budget_allocator(); }
    ~LentMemory() override { fail_allocation(0); }
};

TEST_F(LentMemory, AStepThatGetsItBackIsTheStepThatNeverMissedItWhereverItRanOut) {
    for (const char* model : {"gpt", "norm"}) {
        for (const int before : {0, 8}) {
            TrainingOptions how = rich();
            how.model = model;
            Borrowed undisturbed(how);
            for (int i = 0; i < before; ++i) undisturbed.run.step();
            const std::int64_t start = allocation_count();
            const Seen wanted = see_step(undisturbed.run);
            const std::int64_t allocations = allocation_count() - start;
            ASSERT_EQ(wanted.report.step.noise.has_value(), true);
            EXPECT_EQ(undisturbed.asked, 0);
            for (std::int64_t n = 1; n <= allocations && !HasFailure(); ++n) {
                SCOPED_TRACE(::testing::Message() << model << ", allocation " << n << " of " << allocations);
                Borrowed other(how);
                for (int i = 0; i < before; ++i) other.run.step();
                other.lent = true;
                fail_allocation(n);
                Seen seen{other.run.trainer().step(), {}, {}};
                const bool struck = other.asked > 0;
                fail_allocation(0);
                if (!struck) {  // what is left is see_step's own
                    EXPECT_GT(n, 50);
                    break;
                }
                seen.state = other.run.state();
                seen.numbers = to_json(other.run.trainer().state()).dump();
                expect_same(seen, wanted);
                EXPECT_EQ(other.asked, 1);
            }
        }
    }
}

TEST_F(LentMemory, WhereThatIsNotEnoughTheSnapshotsAreGivenUpAndTheStepIsMade) {
    const Job job = mlp_job({.inputs = 4, .layers = 1, .width = 5, .classes = 3}, {.micro_batch = 3}, "adamw");
    const Batch batch = job.make_batch(7);
    const std::int64_t start = allocation_count();
    {
        const Job same = mlp_job({.inputs = 4, .layers = 1, .width = 5, .classes = 3}, {.micro_batch = 3}, "adamw");
        same.accumulator->step(batch, same.loss);
    }
    const std::int64_t at_start = allocation_count();
    const Job again = mlp_job({.inputs = 4, .layers = 1, .width = 5, .classes = 3}, {.micro_batch = 3}, "adamw");
    const std::int64_t made = allocation_count() - at_start;
    const std::int64_t last = at_start - start - made;  // of the step: in the optimizer's
    std::vector<std::string> asked;
    const StepOptions how{.release_memory =
                              [&] {
                                  if (!asked.empty()) return false;
                                  asked.emplace_back("lent");
                                  fail_allocation(last);
                                  return true;
                              },
                          .give_up_memory =
                              [&] {
                                  asked.emplace_back("given up");
                                  return true;
                              }};
    fail_allocation(last);
    const StepReport report = job.accumulator->step(batch, job.loss, how);
    EXPECT_TRUE(report.applied);
    EXPECT_EQ(report.out_of_memory, 1);
    EXPECT_EQ(report.plan.micro_batch, 3);
    EXPECT_EQ(asked, (std::vector<std::string>{"lent", "given up"}));
}

TEST_F(LentMemory, ASignalIsHeardInABatchThatIsMadeAgain) {
    bool lent = true;
    int micro_batches = 0;
    TrainingOptions how = rich();
    how.trainer.release_memory = [&] { return std::exchange(lent, false); };
    how.trainer.pause = [&] { return !lent && ++micro_batches == 1; };
    Training run(how);
    fail_allocation(60);
    EXPECT_TRUE(run.trainer().step().paused);
    fail_allocation(0);
}

}  // namespace
}  // namespace microbatch
