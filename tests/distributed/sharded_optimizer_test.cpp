// The optimizer's state sharded over ranks (ZeRO-1): the same update, and each rank with its part of the state.

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/optim/adam.h>
#include <torch/optim/sgd.h>

#include <algorithm>
#include <set>

#include "microbatch/optim/torch_optimizer.h"
#include "microbatch/step/probe.h"
#include "support/errors.h"
#include "support/rank_jobs.h"

namespace microbatch {
namespace {

using test::Job;
using test::Left;
using test::making;
using test::RankJob;
using test::run_ranks;

class ShardedOptimizer : public testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Ranks, ShardedOptimizer, testing::Values(1, 2, 3, 4));

// SGD: fp32 rounds 20 updates, each of sums of some hundred terms in another order. AdamW divides by the root of the second
// moment, which scales up the rounding of gradients near 0, with 2^-53 to some 1e-10.
TEST_P(ShardedOptimizer, MakesTheUpdatesOfOneProcess) {
    const std::vector<Batch> batches = test::text_batches(20);
    for (const auto& [optimizer, type, tolerance, micro_batch] :
         {std::tuple{"sgd", at::kFloat, 1e-6, 1}, std::tuple{"sgd", at::kDouble, 1e-12, 3},
          std::tuple{"adamw", at::kDouble, 1e-9, 2}}) {
        const test::MakeJob make = [type = type, optimizer = optimizer] { return test::text_job(type, optimizer); };
        const Plan plan{.micro_batch = micro_batch};
        test::expect_run_of_one(test::run_together(GetParam(), make, batches, plan, /*sharded=*/true),
                                test::run_alone(make, batches, plan), tolerance);
    }
}

std::int64_t bytes_of_state(const Optimizer& optimizer) {
    return state_of(optimizer).bytes();
}

std::set<std::string> names_of_state(const Optimizer& optimizer) {
    std::set<std::string> names;
    const StateDict state = state_of(optimizer);
    for (const auto& [name, tensor] : state.tensors()) names.insert(name);
    return names;
}

TEST_P(ShardedOptimizer, HasOnEachRankItsShareOfTheState) {
    const std::vector<Batch> batches = test::text_batches(2);
    const test::MakeJob make = [] { return test::text_job(at::kFloat, "adamw"); };
    RankJob alone(make(), std::make_shared<LocalReducer>(), {});
    test::run_job(alone, batches);
    const std::int64_t total = bytes_of_state(*alone.job.optimizer);
    std::int64_t largest = 0;
    for (const Parameter& one : alone.job.parameters) {
        largest = std::max(largest, 2 * static_cast<std::int64_t>(one.tensor.nbytes()));
    }
    std::mutex mutex;
    std::set<std::string> all;
    std::size_t count = 0;
    run_ranks(GetParam(), [&](const std::shared_ptr<Group>& group) {
        std::optional<RankJob> rank;
        {
            const std::lock_guard lock(making());
            rank.emplace(make(), std::make_shared<GroupReducer>(group), Plan{}, /*sharded=*/true);
        }
        EXPECT_FALSE(rank->job.optimizer->has_state());
        test::run_job(*rank, batches);
        EXPECT_TRUE(rank->job.optimizer->has_state());
        EXPECT_LE(bytes_of_state(*rank->job.optimizer), total / GetParam() + largest);
        const std::lock_guard lock(mutex);
        for (const std::string& name : names_of_state(*rank->job.optimizer)) {
            all.insert(name);
            ++count;
        }
    });
    EXPECT_EQ(all, names_of_state(*alone.job.optimizer));
    EXPECT_EQ(count, all.size());  // each once
}

// What all have together is the state of one process, and any rank takes its part of that.
TEST_P(ShardedOptimizer, GoesOnFromAStateOfAnyNumberOfProcesses) {
    const std::vector<Batch> batches = test::text_batches(8);
    const std::vector<Batch> first(batches.begin(), batches.begin() + 4), second(batches.begin() + 4, batches.end());
    const test::MakeJob make = [] { return test::text_job(at::kDouble, "adamw"); };
    const Left whole = test::run_alone(make, batches, {.micro_batch = 2});
    StateDict parts;
    test::Named values;
    std::mutex mutex;
    run_ranks(3, [&](const std::shared_ptr<Group>& group) {
        std::optional<RankJob> rank;
        {
            const std::lock_guard lock(making());
            rank.emplace(make(), std::make_shared<GroupReducer>(group), Plan{.micro_batch = 2}, /*sharded=*/true);
        }
        test::run_job(*rank, first);
        StateDict own = state_of(*rank->job.optimizer);
        own.own();
        const std::lock_guard lock(mutex);
        parts.merge("", own);
        if (group->rank() == 0) values = test::values_of(rank->job.parameters);
    });
    run_ranks(GetParam(), [&](const std::shared_ptr<Group>& group) {
        std::optional<RankJob> rank;
        {
            const std::lock_guard lock(making());
            rank.emplace(make(), std::make_shared<GroupReducer>(group), Plan{.micro_batch = 2}, /*sharded=*/true);
            const at::NoGradGuard no_grad;
            for (std::size_t i = 0; i < values.size(); ++i) rank->job.parameters[i].tensor.copy_(values[i].tensor);
            load(*rank->job.optimizer, StateReader(parts));
        }
        for (const std::string& name : names_of_state(*rank->job.optimizer)) {
            EXPECT_TRUE(rank->job.optimizer->keeps(name));
        }
        if (GetParam() > 1) {
            EXPECT_LT(bytes_of_state(*rank->job.optimizer), parts.bytes());
        }
        test::expect_agree(test::run_job(*rank, second).state, whole.state, 1e-9);  // as above
    });
}

TEST(ShardedTorchOptimizer, MakesTheUpdatesOfOneProcess) {
    const std::vector<Batch> batches = test::text_batches(6);
    const auto run = [&](const std::shared_ptr<Reducer>& reducer, bool adam) {
        std::optional<Job> job;
        {
            const std::lock_guard lock(making());
            job.emplace(test::text_job(at::kDouble));
        }
        std::vector<at::Tensor> parameters = tensors_of(job->parameters);
        torch::optim::Adam adam_of(parameters);
        torch::optim::SGD sgd_of(parameters, torch::optim::SGDOptions(0.01).momentum(0.9));
        TorchOptimizer optimizer(adam ? static_cast<torch::optim::Optimizer&>(adam_of) : sgd_of);
        Accumulator accumulator(job->model, optimizer,
                                {.plan = {.micro_batch = 2}, .reducer = reducer, .shard_optimizer = true});
        for (const Batch& batch : batches) accumulator.step(batch, job->loss);
        EXPECT_TRUE(optimizer.has_state());
        for (const std::string& name : names_of_state(optimizer)) EXPECT_TRUE(optimizer.keeps(name));
        std::size_t kept = 0;
        for (std::size_t i = 0; i < parameters.size(); ++i) kept += optimizer.keeps(str_cat(i, "/exp_avg")) ? 1 : 0;
        EXPECT_EQ(kept == parameters.size(), reducer->size() == 1);
        return test::values_of(job->parameters);
    };
    for (const bool adam : {true, false}) {
        const test::Named alone = run(std::make_shared<LocalReducer>(), adam);
        run_ranks(2, [&](const std::shared_ptr<Group>& group) {
            test::expect_agree(run(std::make_shared<GroupReducer>(group), adam), alone, 1e-9);  // as AdamW above
        });
    }
}

TEST(ShardedOptimizerInTrouble, RefusesABatchOnAllIfAGradientIsNotFiniteOnOne) {
    const std::vector<Batch> batches = test::text_batches(3);
    run_ranks(3, [&](const std::shared_ptr<Group>& group) {
        std::optional<RankJob> rank;
        {
            const std::lock_guard lock(making());
            rank.emplace(test::text_job(at::kFloat, "adamw"), std::make_shared<GroupReducer>(group), Plan{}, true);
        }
        const test::Named before = test::values_of(rank->job.parameters);
        const LossFunction loss = [&, own = rank->job.loss](const Batch& micro) {
            WeightedLoss result = own(micro);
            if (group->rank() == 2) result.sum = result.sum + rank->job.parameters[0].tensor.log().sum() * 0.0;
            return result;
        };
        const StepReport report = rank->accumulator->step(batches[2], loss);
        EXPECT_FALSE(report.applied);
        EXPECT_FALSE(report.reason.empty());
        test::expect_same_bits(test::values_of(rank->job.parameters), before);
        EXPECT_TRUE(rank->accumulator->step(batches[2], rank->job.loss).applied);
    });
}

/// Fails in the update, after all have agreed.
class FailingOptimizer final : public Optimizer {
public:
    FailingOptimizer(Optimizer& real, bool fails) : real_(real), fails_(fails) {}
    void step(std::span<const GradientView> gradients, double divisor) override {
        if (fails_) throw std::runtime_error("the update of this rank failed");
        real_.step(gradients, divisor);
    }
    void dry_run(std::span<const GradientView> gradients, double divisor) override {
        real_.dry_run(gradients, divisor);
    }
    void end_dry_run() override { real_.end_dry_run(); }
    bool has_state() const override { return real_.has_state(); }
    double learning_rate() const override { return real_.learning_rate(); }
    void set_learning_rate(double rate) override { real_.set_learning_rate(rate); }
    std::vector<at::Tensor> parameters() const override { return real_.parameters(); }
    void save(const StateWriter& writer) const override { real_.save(writer); }
    Commit prepare(const StateReader& reader) override { return real_.prepare(reader); }
    void update_only(const std::vector<at::Tensor>& own) override { real_.update_only(own); }
    bool keeps(std::string_view name) const override { return real_.keeps(name); }
    bool is_partial() const override { return real_.is_partial(); }

private:
    Optimizer& real_;
    bool fails_;
};

TEST(ShardedOptimizerInTrouble, EndsOnAllIfTheUpdateOfOneFailsAndSaysThatTheParametersAreAMixture) {
    const std::vector<Batch> batches = test::text_batches(3);
    run_ranks(3, [&](const std::shared_ptr<Group>& group) {
        std::optional<Job> job;
        {
            const std::lock_guard lock(making());
            job.emplace(test::text_job(at::kFloat, "adamw"));
        }
        FailingOptimizer optimizer(*job->optimizer, group->rank() == 1);
        Accumulator accumulator(job->model, optimizer,
                                {.reducer = std::make_shared<GroupReducer>(group), .shard_optimizer = true});
        accumulator.require_whole_update();
        if (group->rank() == 1) {
            EXPECT_THROW(accumulator.step(batches[2], job->loss), std::runtime_error);
        } else {
            test::expect_error(ErrorKind::lost_rank, {"rank 1", "the update of this rank failed"},
                               [&] { accumulator.step(batches[2], job->loss); });
            test::expect_error(ErrorKind::lost_rank, {"mixture of two steps"},
                               [&] { accumulator.require_whole_update(); });
        }
    });
}

TEST(AShardedOptimizer, MakesTheStepItself) {
    const std::vector<Batch> batches = test::text_batches(3);
    run_ranks(2, [&](const std::shared_ptr<Group>& group) {
        std::optional<RankJob> rank;
        {
            const std::lock_guard lock(making());
            rank.emplace(test::text_job(at::kFloat), std::make_shared<GroupReducer>(group), Plan{}, true);
        }
        rank->accumulator->gather(batches[2], rank->job.loss);
        test::expect_usage_error({"sharded", "apply()"}, [&] { rank->accumulator->hand_over(); });
        EXPECT_TRUE(rank->accumulator->apply().applied);
    });
}

// A head of two tensors on a frozen model: the third rank updates nothing, and takes part.
TEST(AShardedOptimizer, MayHaveRanksThatUpdateNothing) {
    const std::vector<Batch> batches = test::text_batches(6);
    const auto run = [&](const std::shared_ptr<Reducer>& reducer) {
        std::optional<Job> job;
        {
            const std::lock_guard lock(making());
            job.emplace(test::text_job(at::kDouble, "adamw"));
        }
        for (std::size_t i = 2; i < job->parameters.size(); ++i) job->parameters[i].tensor.set_requires_grad(false);
        Accumulator accumulator(job->model, *job->optimizer, {.reducer = reducer, .shard_optimizer = true});
        for (const Batch& batch : batches) accumulator.step(batch, job->loss);
        return test::values_of(job->parameters);
    };
    const test::Named alone = run(std::make_shared<LocalReducer>());
    run_ranks(4, [&](const std::shared_ptr<Group>& group) {
        test::expect_agree(run(std::make_shared<GroupReducer>(group)), alone, 1e-9);  // as AdamW above
    });
}

TEST(AShardedOptimizer, SaysOnAllRanksIfNoParameterHasAGradient) {
    run_ranks(2, [&](const std::shared_ptr<Group>& group) {
        const at::Tensor used = at::zeros({2}).set_requires_grad(true), other = at::zeros({2}).set_requires_grad(true);
        Sgd optimizer({{.parameters = {{"used", used}}}}, {.learning_rate = 0.1});
        Accumulator accumulator(Parameters{{"used", used}}, optimizer,
                                {.reducer = std::make_shared<GroupReducer>(group), .shard_optimizer = true});
        const LossFunction loss = [&](const Batch& micro) -> WeightedLoss {
            return {other.sum(), static_cast<double>(micro.size())};
        };
        test::expect_usage_error({"no parameter received a gradient"}, [&] {
            accumulator.step(Batch{{at::ones({4, 1})}}, loss);
        });
    });
}

TEST(AShardedOptimizer, TakesParametersThatAreAddedLater) {
    const auto run = [&](const std::shared_ptr<Reducer>& reducer) {
        const at::Tensor first = at::ones({3}, at::kDouble).set_requires_grad(true);
        const at::Tensor second = at::ones({3}, at::kDouble).set_requires_grad(true);
        AdamW optimizer({{.parameters = {{"first", first}}}});
        Accumulator accumulator(Parameters{{"first", first}}, optimizer, {.reducer = reducer, .shard_optimizer = true});
        const auto step = [&](bool both) {
            const LossFunction loss = [&](const Batch& micro) -> WeightedLoss {
                const at::Tensor sum = (micro.fields[0] * first).sum();
                return {both ? sum + (micro.fields[0] * second).square().sum() : sum,
                        static_cast<double>(micro.size())};
            };
            EXPECT_TRUE(accumulator.step(Batch{{at::ones({4, 3}, at::kDouble)}}, loss).applied);
        };
        step(false);
        optimizer.add_group({.parameters = {{"second", second}}});
        accumulator.track({{"second", second}});
        for (int i = 0; i < 3; ++i) step(true);
        return test::Named{{"first", first.detach()}, {"second", second.detach()}};
    };
    const test::Named alone = run(std::make_shared<LocalReducer>());
    EXPECT_NE(alone[1].tensor[0].item<double>(), 1.0);
    run_ranks(2, [&](const std::shared_ptr<Group>& group) {
        test::expect_agree(run(std::make_shared<GroupReducer>(group)), alone, 1e-12);
    });
}

TEST(AShardedOptimizer, IsNotTakenOverByAnotherAccumulator) {
    const std::vector<Batch> batches = test::text_batches(3);
    run_ranks(2, [&](const std::shared_ptr<Group>& group) {
        std::optional<RankJob> rank;
        {
            const std::lock_guard lock(making());
            rank.emplace(test::text_job(at::kFloat, "adamw"), std::make_shared<GroupReducer>(group), Plan{}, true);
        }
        rank->accumulator->step(batches[2], rank->job.loss);
        test::expect_usage_error({"make a new one"}, [&] { rank->accumulator->shard_optimizer(false); });
        for (const bool sharded : {false, true}) {
            test::expect_usage_error({"sharded by another accumulator"}, [&] {
                Accumulator(rank->job.model, *rank->job.optimizer,
                            {.reducer = std::make_shared<GroupReducer>(group), .shard_optimizer = sharded});
            });
        }
        EXPECT_TRUE(rank->accumulator->step(batches[2], rank->job.loss).applied);
    });
}

TEST(AShardedOptimizer, IsPlannedWithItsShareOfTheState) {
    const Batch batch = test::text_batches(3)[2];
    run_ranks(2, [&](const std::shared_ptr<Group>& group) {
        std::optional<RankJob> rank;
        PlanReport whole, sharded;
        {
            const std::lock_guard lock(making());
            rank.emplace(test::text_job(at::kFloat, "adamw"), std::make_shared<GroupReducer>(group), Plan{});
            const PlannerOptions options{.budget_bytes = std::int64_t{1} << 30};
            whole = plan_batch(*rank->accumulator, TensorBatch(batch), rank->job.loss, options);
            rank->accumulator->shard_optimizer();
            sharded = plan_batch(*rank->accumulator, TensorBatch(batch), rank->job.loss, options);
        }
        EXPECT_TRUE(rank->accumulator->step(batch, rank->job.loss).applied);
        // The step counts are scalars of 4 bytes, each in a block of 64.
        const std::int64_t state = bytes_of_state(*rank->job.optimizer);
        EXPECT_NEAR(sharded.fixed.optimizer_state, state, 64.0 * 2 * static_cast<double>(rank->job.parameters.size()));
        EXPECT_LT(sharded.fixed.optimizer_state, 0.7 * static_cast<double>(whole.fixed.optimizer_state));
    });
}

TEST(AShardedOptimizer, IsWholeAgainIfItIsTakenBack) {
    const std::vector<Batch> batches = test::text_batches(4);
    const test::MakeJob make = [] { return test::text_job(at::kFloat, "adamw"); };
    const auto whole = test::run_together(2, make, batches, {.micro_batch = 2});
    run_ranks(2, [&](const std::shared_ptr<Group>& group) {
        std::optional<RankJob> rank;
        {
            const std::lock_guard lock(making());
            rank.emplace(make(), std::make_shared<GroupReducer>(group), Plan{.micro_batch = 2}, true);
        }
        EXPECT_GT(rank->accumulator->reducer().exchange_seconds(rank->job.parameters), 0.0);
        rank->accumulator->shard_optimizer(false);
        EXPECT_GT(rank->accumulator->reducer().exchange_seconds(rank->job.parameters), 0.0);
        test::expect_same_bits(test::run_job(*rank, batches).state, whole.front().state);
    });
}

}  // namespace
}  // namespace microbatch
