#include "microbatch/distributed/group_reducer.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <mutex>
#include <numeric>

#include "microbatch/models/gpt.h"
#include "microbatch/step/probe.h"
#include "support/errors.h"
#include "support/jobs.h"
#include "support/models.h"
#include "support/rank_jobs.h"

namespace microbatch {
namespace {

using test::failures_of_ranks;
using test::Job;
using test::run_ranks;

using test::expect_run_of_one;
using test::Left;
using test::MakeJob;
using test::making;
using test::RankJob;
using test::run_alone;
using test::run_job;
using test::run_together;
using test::text_batches;
using test::text_job;

class Ranks : public testing::TestWithParam<std::tuple<int, std::int64_t>> {
protected:
    int size() const { return std::get<0>(GetParam()); }
    Plan plan(BatchNorm policy = BatchNorm::naive) const {
        return {.micro_batch = std::get<1>(GetParam()), .batch_norm = policy};
    }
};

// fp32: 20 updates, each of sums of some hundred terms in another order. fp64: the same with 2^-53.
TEST_P(Ranks, MakeTheUpdatesOfOneProcessOnMaskedText) {
    for (const auto& [type, tolerance] : {std::pair{at::kFloat, 1e-6}, std::pair{at::kDouble, 1e-12}}) {
        const MakeJob make = [type = type] { return text_job(type); };
        const std::vector<Batch> batches = text_batches(20);
        expect_run_of_one(run_together(size(), make, batches, plan()), run_alone(make, batches, plan()), tolerance);
    }
}

TEST_P(Ranks, MakeTheUpdatesOfOneProcessOnImagesWithDeferredBatchNorm) {
    const MakeJob make = [] {
        Job job = test::resnet_job({.channels = 1, .classes = 4, .width = 4, .blocks = 1, .norm = ImageNorm::batch}, {},
                                   "sgd");
        job.model->to(at::kDouble);
        return job;
    };
    std::vector<Batch> batches;
    for (std::int64_t i = 0; i < 4; ++i) {
        batches.push_back(make().make_batch(12 * std::get<1>(GetParam())));
        batches.back().fields[0] = batches.back().fields[0].to(at::kDouble) + i;
    }
    // The same micro-batches on all: a multiple of the ranks and of the micro-batch.
    const Plan deferred = plan(BatchNorm::deferred);
    if (deferred.micro_batch < 2) return;  // BatchNorm of one sample
    expect_run_of_one(run_together(size(), make, batches, deferred), run_alone(make, batches, deferred), 1e-12);
}

TEST_P(Ranks, MeasureTheNoiseOfOneProcess) {
    const Batch batch = text_batches(3)[2];
    const auto measured = [&](const std::shared_ptr<Reducer>& reducer, Job job) {
        RankJob rank(std::move(job), reducer, plan());
        return rank.accumulator->step(batch, rank.job.loss, {.measure_noise = true}).noise;
    };
    const auto make = [] { return text_job(at::kDouble); };
    // Micro-batches of one sample are the same ones over all ranks.
    if (plan().micro_batch != 1) return;
    const auto alone = measured(std::make_shared<LocalReducer>(), make());
    ASSERT_TRUE(alone.has_value());
    run_ranks(size(), [&](const std::shared_ptr<Group>& group) {
        std::optional<Job> job;
        {
            const std::lock_guard lock(making());
            job.emplace(make());
        }
        const auto noise = measured(std::make_shared<GroupReducer>(group), std::move(*job));
        ASSERT_TRUE(noise.has_value());
        EXPECT_NEAR(noise->variance, alone->variance, 1e-12 * std::abs(alone->variance));
        EXPECT_NEAR(noise->squared_gradient, alone->squared_gradient, 1e-12 * std::abs(alone->variance));
    });
}

INSTANTIATE_TEST_SUITE_P(Sizes, Ranks, testing::Combine(testing::Values(1, 2, 3, 4), testing::Values(1, 2, 5)));

/// Runs steps of a job whose loss of a micro-batch is replaced on rank 1.
std::vector<Left> run_with_trouble(const std::function<WeightedLoss(const LossFunction&, const Batch&)>& trouble,
                                   const std::vector<Batch>& batches, Plan plan) {
    std::vector<Left> all(3);
    run_ranks(3, [&](const std::shared_ptr<Group>& group) {
        std::optional<RankJob> rank;
        {
            const std::lock_guard lock(making());
            rank.emplace(text_job(at::kFloat), std::make_shared<GroupReducer>(group), plan);
        }
        if (group->rank() == 1) {
            rank->job.loss = [&, own = rank->job.loss](const Batch& micro) { return trouble(own, micro); };
        }
        all[static_cast<std::size_t>(group->rank())] = run_job(*rank, batches);
    });
    return all;
}

// 12 samples over 3 ranks: 4 each.
std::vector<Batch> three_batches() {
    std::vector<Batch> batches;
    for (std::int64_t i = 0; i < 3; ++i) batches.push_back(text_job(at::kFloat).make_batch(12));
    return batches;
}

TEST(RanksInTrouble, RepeatABatchInSmallerMicroBatchesOnAllIfMemoryRunsOutOnOne) {
    const std::vector<Batch> batches = three_batches();
    const auto all = run_with_trouble(
        [](const LossFunction& own, const Batch& micro) {
            TORCH_CHECK_WITH(OutOfMemoryError, micro.size() <= 2, "not for so many");
            return own(micro);
        },
        batches, {.micro_batch = 4});
    const auto smaller = run_together(3, [] { return text_job(at::kFloat); }, batches, {.micro_batch = 2});
    for (std::size_t rank = 0; rank < 3; ++rank) {
        test::expect_same_bits(all[rank].state, smaller[rank].state);
        EXPECT_EQ(all[rank].reports[0].out_of_memory, 1);
        EXPECT_EQ(all[rank].reports[1].out_of_memory, 0);  // the cap is known
        EXPECT_EQ(all[rank].reports[0].plan.micro_batch, 2);
    }
}

// What one can free is its own affair: the others do not ask what they do not have.
TEST(RanksInTrouble, RepeatABatchAlikeThoughOneHasMoreToFree) {
    const Batch batch = three_batches().front();
    for (const int failing : {0, 1}) {
        for (const bool helps : {false, true}) {
            run_ranks(3, [&](const std::shared_ptr<Group>& group) {
                std::optional<RankJob> rank;
                {
                    const std::lock_guard lock(making());
                    rank.emplace(text_job(at::kFloat), std::make_shared<GroupReducer>(group), Plan{.micro_batch = 4});
                }
                int calls = 0, asked = 0;
                const LossFunction loss = [&, own = rank->job.loss](const Batch& micro) {
                    const bool fails = group->rank() == failing && (helps ? calls++ == 0 : micro.size() > 2);
                    TORCH_CHECK_WITH(OutOfMemoryError, !fails, "none left");
                    return own(micro);
                };
                StepOptions options{.measure_noise = true};
                if (group->rank() == 0) options.before_noise = {{[&] { return asked++ == 0 && helps; }}};
                const StepReport report = rank->accumulator->step(batch, loss, options);
                EXPECT_TRUE(report.applied);
                const bool freed = helps && failing == 0;  // only rank 0 has something
                EXPECT_EQ(report.noise.has_value(), freed);
                EXPECT_EQ(report.plan.micro_batch, helps ? 4 : 2);
                EXPECT_EQ(asked > 0, group->rank() == 0 && failing == 0);
            });
        }
    }
}

TEST(RanksInTrouble, RefuseABatchOnAllIfItsLossIsNotFiniteOnOne) {
    const std::vector<Batch> batches = three_batches();
    int calls = 0;
    const auto all = run_with_trouble(
        [&](const LossFunction& own, const Batch& micro) {
            WeightedLoss loss = own(micro);
            if (++calls == 3) loss.sum = loss.sum * std::numeric_limits<double>::quiet_NaN();
            return loss;
        },
        batches, {.micro_batch = 2});
    for (const Left& one : all) {
        EXPECT_EQ(one.reports[1].reason, "loss is not finite");
        EXPECT_TRUE(one.reports[0].applied && !one.reports[1].applied && one.reports[2].applied);
        test::expect_same_bits(one.state, all.front().state);
    }
}

TEST(RanksInTrouble, EndOnAllIfTheLossFunctionOfOneFails) {
    const std::vector<Batch> batches = three_batches();
    const auto failures = failures_of_ranks(3, [&](const std::shared_ptr<Group>& group) {
        std::optional<RankJob> rank;
        {
            const std::lock_guard lock(making());
            rank.emplace(text_job(at::kFloat), std::make_shared<GroupReducer>(group), Plan{.micro_batch = 2});
        }
        const test::Named before = test::values_of(rank->job.parameters);
        const int fails = group->rank();
        if (fails == 1) {
            rank->job.loss = [](const Batch&) -> WeightedLoss { throw std::runtime_error("no such sample"); };
            EXPECT_THROW(run_job(*rank, batches), std::runtime_error);
        } else {
            test::expect_error(ErrorKind::lost_rank, {"rank 1 has failed: no such sample"},
                               [&] { run_job(*rank, batches); });
        }
        test::expect_same_bits(test::values_of(rank->job.parameters), before);
        test::expect_no_gradients(rank->job.parameters);
    });
    for (const auto& failure : failures) EXPECT_FALSE(failure);
}

TEST(RanksInTrouble, SumAParameterThatOnlySomeUse) {
    // Rank 1 alone uses the second layer.
    run_ranks(2, [&](const std::shared_ptr<Group>& group) {
        std::shared_ptr<test::TanhMlp> model;
        {
            const std::lock_guard lock(making());
            model = test::make_mlp(1);
        }
        Sgd optimizer({{.parameters = parameters_of(*model)}}, {.learning_rate = 1.0});
        Accumulator accumulator(model, optimizer, {.reducer = std::make_shared<GroupReducer>(group)});
        const at::Tensor before = model->second->bias.detach().clone();
        const LossFunction loss = [&](const Batch& micro) -> WeightedLoss {
            at::Tensor sum = model->first->forward(micro.fields[0]).sum();
            if (group->rank() == 1) sum = sum + model->second->bias.sum();
            return {sum, static_cast<double>(micro.size())};
        };
        accumulator.step(Batch{{at::ones({4, 3}, at::kDouble)}}, loss);
        EXPECT_TRUE(test::same_bits(model->second->bias, before - 0.25));  // 1 / 4 samples, exact
    });
}

// Each plans by times of its own, in as many trials as it needs.
TEST(RanksThatPlan, DoNotWaitForEachOther) {
    const Batch batch = three_batches().front();
    run_ranks(2, [&](const std::shared_ptr<Group>& group) {
        std::optional<RankJob> rank;
        {
            const std::lock_guard lock(making());
            rank.emplace(text_job(at::kFloat), std::make_shared<GroupReducer>(group), Plan{.micro_batch = 3});
        }
        if (group->rank() == 1) {
            const std::lock_guard lock(making());
            plan_batch(*rank->accumulator, TensorBatch(batch), rank->job.loss, {.budget_bytes = std::int64_t{1} << 30});
        }
        EXPECT_TRUE(rank->accumulator->step(batch, rank->job.loss).applied);
    });
}

TEST(SharedStart, GivesAllWhatTheFirstHas) {
    run_ranks(3, [](const std::shared_ptr<Group>& group) {
        std::shared_ptr<test::TanhMlp> model, first;
        {
            const std::lock_guard lock(making());
            model = test::make_mlp(static_cast<std::uint64_t>(group->rank()));
            first = test::make_mlp(0);
        }
        share_from_first(*group, parameters_of(*model), {});
        test::expect_same_bits(test::values_of(parameters_of(*model)), test::values_of(parameters_of(*first)));
    });
}

TEST(SharedStart, RefusesAModelWithOtherParameters) {
    const auto failures = failures_of_ranks(2, [](const std::shared_ptr<Group>& group) {
        const at::Tensor value = at::zeros({2 + group->rank()});
        share_from_first(*group, {{"weight", value}}, {});
    });
    for (const auto& failure : failures) {
        ASSERT_TRUE(failure);
        test::expect_usage_error({"the model of rank 1 has other parameters"},
                                 [&] { std::rethrow_exception(failure); });
    }
}

}  // namespace
}  // namespace microbatch
