// The invariant mode: the same bits for any micro-batch and any number of processes.

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <limits>

#include "microbatch/step/probe.h"
#include "support/errors.h"
#include "support/rank_jobs.h"

namespace microbatch {
namespace {

using test::Job;
using test::Left;
using test::making;
using test::run_ranks;

struct InvariantJob {
    Job job;
    std::unique_ptr<Accumulator> accumulator;

    InvariantJob(Job made, const std::shared_ptr<Reducer>& reducer, Plan plan, std::int64_t grain, bool sharded)
        : job(std::move(made)) {
        accumulator = std::make_unique<Accumulator>(
            job.model, *job.optimizer,
            AccumulatorOptions{
                .plan = plan, .clip_norm = 1.0, .reducer = reducer, .shard_optimizer = sharded, .grain = grain});
    }

    Left run(const std::vector<Batch>& batches) {
        Left left;
        for (const Batch& batch : batches) left.reports.push_back(accumulator->step(batch, job.loss));
        left.state = test::values_of(job.parameters);
        return left;
    }
};

Job adam_text() {
    return test::text_job(at::kFloat, "adamw");
}
Job adam_mlp() {
    return test::mlp_job({.inputs = 5, .layers = 2, .width = 12, .classes = 3});
}

void expect_same(const Left& left, const Left& right) {
    test::expect_same_bits(left.state, right.state);
    ASSERT_EQ(left.reports.size(), right.reports.size());
    for (std::size_t i = 0; i < left.reports.size(); ++i) {
        EXPECT_EQ(left.reports[i].loss, right.reports[i].loss);
        EXPECT_EQ(left.reports[i].weight, right.reports[i].weight);
        EXPECT_EQ(left.reports[i].gradient_norm, right.reports[i].gradient_norm);
        EXPECT_EQ(left.reports[i].applied, right.reports[i].applied);
    }
}

// Everything below: ranks are threads of this process, which share torch's generator; models without dropout. With
// dropout, tests/cli/test_invariant.py has processes.
class Invariant : public testing::TestWithParam<std::tuple<int, bool>> {
protected:
    int size() const { return std::get<0>(GetParam()); }
    bool sharded() const { return std::get<1>(GetParam()); }
};
INSTANTIATE_TEST_SUITE_P(Ranks, Invariant, testing::Combine(testing::Values(1, 2, 3, 4), testing::Bool()));

TEST_P(Invariant, HasTheSameBitsForAnyMicroBatchAndAnyNumberOfProcesses) {
    std::vector<Batch> images;
    for (std::int64_t i = 0; i < 20; ++i) images.push_back(adam_mlp().make_batch(2 + i % 9));
    const auto expect_same_bits = [&](Job (*make)(), const std::vector<Batch>& batches, std::int64_t grain,
                                      std::int64_t micro_batch) {
        const Left alone = InvariantJob(make(), std::make_shared<LocalReducer>(), {}, grain, false).run(batches);
        run_ranks(size(), [&](const std::shared_ptr<Group>& group) {
            std::optional<InvariantJob> rank;
            {
                const std::lock_guard lock(making());
                rank.emplace(make(), std::make_shared<GroupReducer>(group), Plan{.micro_batch = micro_batch}, grain,
                             sharded());
            }
            group->any(false);  // all models are made before a grain seeds the generator that they share
            expect_same(rank->run(batches), alone);
        });
    };
    expect_same_bits(&adam_text, test::text_batches(20), 1, 3);
    expect_same_bits(&adam_mlp, images, 2, 1);
    expect_same_bits(&adam_mlp, images, 1, 8);
}

TEST(InvariantMode, IsTheUpdateOfTheFastMode) {
    const std::vector<Batch> batches = test::text_batches(12);
    const auto make = [] { return test::text_job(at::kFloat); };
    const Left fast = test::run_alone(make, batches, {.micro_batch = 3});
    const Left same = InvariantJob(make(), std::make_shared<LocalReducer>(), {}, 1, false).run(batches);
    // SGD in fp32: 12 updates, each of sums of some hundred terms in another order.
    test::expect_agree(same.state, Left(fast).state, 1e-6);
}

TEST(InvariantMode, HasTheSameBitsWithRecompute) {
    const std::vector<Batch> batches = test::text_batches(6);
    const auto run = [&](bool recompute) {
        return InvariantJob(adam_text(), std::make_shared<LocalReducer>(), {.recompute = recompute}, 2, false)
            .run(batches);
    };
    expect_same(run(true), run(false));
}

// What is known of the range is part of the run: two that differ in it would sum in other quanta.
TEST(InvariantMode, GoesOnWithTheSameBitsAfterGradientsThatGrewAndShrank) {
    std::vector<Batch> batches = test::text_batches(9);
    const auto scaled = [](const LossFunction& own, std::int64_t& step) {
        return [&own, &step](const Batch& micro) {
            WeightedLoss loss = own(micro);
            loss.sum = loss.sum * std::pow(10.0, step % 3 == 1 ? 6.0 : step % 3 == 2 ? -6.0 : 0.0);
            return loss;
        };
    };
    const auto run = [&](const std::shared_ptr<Reducer>& reducer, std::int64_t interrupted_at) {
        std::optional<InvariantJob> job;
        const auto start = [&] {
            const std::lock_guard lock(making());
            job.emplace(adam_text(), reducer, Plan{}, 1, false);
        };
        start();
        reducer->any_rank(false);  // as above
        test::Named left;
        for (std::int64_t step = 0; step < std::ssize(batches); ++step) {
            if (step == interrupted_at) {
                StateDict saved = state_of(*job->job.optimizer);
                job->accumulator->save_ranges(StateWriter(saved, "ranges/"));
                saved.own();
                const test::Named values = test::values_of(job->job.parameters);
                start();
                reducer->any_rank(false);
                StateDict optimizer = saved;
                optimizer.erase("ranges/");
                load(*job->job.optimizer, StateReader(optimizer));
                job->accumulator->prepare_ranges(StateReader(saved).section("ranges"))();
                const at::NoGradGuard no_grad;
                for (std::size_t i = 0; i < values.size(); ++i) job->job.parameters[i].tensor.copy_(values[i].tensor);
            }
            job->accumulator->step(batches[static_cast<std::size_t>(step)], scaled(job->job.loss, step));
        }
        return test::values_of(job->job.parameters);
    };
    const test::Named whole = run(std::make_shared<LocalReducer>(), -1);
    for (const std::int64_t at : {1, 2, 5}) test::expect_same_bits(run(std::make_shared<LocalReducer>(), at), whole);
    run_ranks(3, [&](const std::shared_ptr<Group>& group) {
        test::expect_same_bits(run(std::make_shared<GroupReducer>(group), 4), whole);
    });
}

TEST(InvariantMode, RefusesWhatIsNotFiniteOnAllAndGoesOn) {
    const std::vector<Batch> batches = test::text_batches(5);
    const auto run = [&](const std::shared_ptr<Reducer>& reducer, bool has_it) {
        std::optional<InvariantJob> job;
        {
            const std::lock_guard lock(making());
            job.emplace(adam_text(), reducer, Plan{}, 1, false);
        }
        reducer->any_rank(false);
        Left left;
        for (std::size_t i = 0; i < batches.size(); ++i) {
            const LossFunction loss = [&, own = job->job.loss](const Batch& micro) {
                WeightedLoss result = own(micro);
                if (has_it && i == 2) result.sum = result.sum * std::numeric_limits<float>::infinity();
                return result;
            };
            left.reports.push_back(job->accumulator->step(batches[i], loss));
        }
        EXPECT_FALSE(left.reports[2].applied);
        left.state = test::values_of(job->job.parameters);
        return left.state;
    };
    const test::Named alone = run(std::make_shared<LocalReducer>(), true);
    run_ranks(3, [&](const std::shared_ptr<Group>& group) {
        test::expect_same_bits(run(std::make_shared<GroupReducer>(group), group->rank() == 2), alone);
    });
}

TEST(InvariantMode, RefusesBatchNormThatMovesAndNamesIt) {
    test::Job job = test::resnet_job({.channels = 1, .classes = 4, .width = 4, .blocks = 1, .norm = ImageNorm::batch});
    const Batch batch = job.make_batch(4);
    for (const BatchNorm policy : {BatchNorm::naive, BatchNorm::deferred, BatchNorm::exact}) {
        Accumulator accumulator(job.model, *job.optimizer, {.plan = {.batch_norm = policy}, .grain = 2});
        test::expect_usage_error({"invariant", "BatchNorm", "norm", "frozen"},
                                 [&] { accumulator.step(batch, job.loss); });
    }
    Accumulator frozen(job.model, *job.optimizer, {.plan = {.batch_norm = BatchNorm::frozen}, .grain = 2});
    EXPECT_TRUE(frozen.step(batch, job.loss).applied);
}

TEST(InvariantMode, RefusesToBeStreamed) {
    InvariantJob job(adam_mlp(), std::make_shared<LocalReducer>(), {}, 1, false);
    test::expect_usage_error({"grain", "step()"}, [&] { job.accumulator->begin(); });
    test::expect_usage_error({"grain is -1"},
                             [] { InvariantJob(adam_mlp(), std::make_shared<LocalReducer>(), {}, -1, false); });
}

// A smaller grain would give other bits.
TEST(InvariantMode, DoesNotMakeAGrainSmallerIfMemoryRunsOut) {
    InvariantJob job(adam_mlp(), std::make_shared<LocalReducer>(), {}, 4, false);
    const LossFunction loss = [own = job.job.loss](const Batch& micro) {
        TORCH_CHECK_WITH(OutOfMemoryError, micro.size() <= 2, "not for so many");
        return own(micro);
    };
    test::expect_error(ErrorKind::does_not_fit, {"a grain of 4"},
                       [&] { job.accumulator->step(adam_mlp().make_batch(8), loss); });
}

TEST(InvariantMode, IsPlannedWithItsSums) {
    InvariantJob job(adam_mlp(), std::make_shared<LocalReducer>(), {}, 2, false);
    const Batch batch = adam_mlp().make_batch(6);
    const PlanReport report =
        plan_batch(*job.accumulator, batch, job.job.loss, {.budget_bytes = std::int64_t{1} << 30, .micro_batch = 2});
    std::int64_t numbers = 0;
    for (const Parameter& one : job.job.parameters) numbers += one.tensor.numel();
    EXPECT_GE(report.choice().peak_bytes(), report.fixed.parameters + 8 * numbers);
    EXPECT_TRUE(job.accumulator->step(batch, job.job.loss).applied);
}

}  // namespace
}  // namespace microbatch
