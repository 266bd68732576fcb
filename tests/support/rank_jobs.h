#pragma once

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "microbatch/distributed/group_reducer.h"
#include "support/jobs.h"
#include "support/models.h"
#include "support/ranks.h"

namespace microbatch::test {

/// A job of one rank; each has its own, made alike.
struct RankJob {
    Job job;
    std::shared_ptr<Reducer> reducer;
    std::unique_ptr<Accumulator> accumulator;

    RankJob(Job made, std::shared_ptr<Reducer> of, Plan plan, bool sharded = false)
        : job(std::move(made)), reducer(std::move(of)) {
        accumulator = std::make_unique<Accumulator>(
            job.model, *job.optimizer,
            AccumulatorOptions{.plan = plan, .clip_norm = 1.0, .reducer = reducer, .shard_optimizer = sharded});
    }
};

using MakeJob = std::function<Job()>;

inline std::mutex& making() {  // draws from the default generator
    static std::mutex mutex;
    return mutex;
}

/// What a run has left: the parameters and buffers, and the reports of its steps.
struct Left {
    Named state;
    std::vector<StepReport> reports;
};

inline Left run_job(RankJob& rank, const std::vector<Batch>& batches) {
    Left left;
    for (const Batch& batch : batches) left.reports.push_back(rank.accumulator->step(batch, rank.job.loss));
    left.state = rank.job.state();
    left.state.pop_back();  // the generator, which the threads share
    return left;
}

inline Left run_alone(const MakeJob& make, const std::vector<Batch>& batches, Plan plan) {
    RankJob alone(make(), std::make_shared<LocalReducer>(), plan);
    return run_job(alone, batches);
}

inline std::vector<Left> run_together(int size, const MakeJob& make, const std::vector<Batch>& batches, Plan plan,
                                      bool sharded = false) {
    std::vector<Left> all(static_cast<std::size_t>(size));
    run_ranks(size, [&](const std::shared_ptr<Group>& group) {
        std::optional<RankJob> rank;
        {
            const std::lock_guard lock(making());
            rank.emplace(make(), std::make_shared<GroupReducer>(group), plan, sharded);
        }
        all[static_cast<std::size_t>(group->rank())] = run_job(*rank, batches);
    });
    return all;
}

// The same on all ranks, in bits, and that of one process, up to rounding.
inline void expect_run_of_one(const std::vector<Left>& all, const Left& alone, double tolerance) {
    for (const Left& one : all) {
        expect_same_bits(one.state, all.front().state);
        expect_agree(one.state, alone.state, tolerance);
        ASSERT_EQ(one.reports.size(), alone.reports.size());
        for (std::size_t i = 0; i < one.reports.size(); ++i) {
            const StepReport &report = one.reports[i], &expected = alone.reports[i];
            EXPECT_NEAR(report.loss, expected.loss, 10 * tolerance * std::abs(expected.loss));
            EXPECT_EQ(report.weight, expected.weight);
            EXPECT_NEAR(report.gradient_norm, expected.gradient_norm, 10 * tolerance * expected.gradient_norm);
            EXPECT_EQ(report.applied, expected.applied) << report.reason;
            EXPECT_EQ(report.reason, expected.reason);
        }
    }
}

// Targets that do not count: at the end of a sample, all of a sample, and all of a rank's share.
inline void mask(Batch& batch, std::uint64_t seed) {
    at::Tensor targets = batch.fields[1];
    at::Generator random = generator(seed);
    const std::int64_t samples = targets.size(0), length = targets.size(1);
    for (std::int64_t i = 0; i < samples; ++i) {
        const std::int64_t keeps = at::randint(length + 1, {1}, random, at::kLong).item<std::int64_t>();
        targets[i].slice(0, keeps).fill_(-100);
    }
    if (seed % 3 == 0) targets.slice(0, 0, samples / 2).fill_(-100);
    if (seed % 3 == 1) targets.slice(0, samples / 2).fill_(-100);
}

inline Job text_job(at::ScalarType type, const std::string& optimizer = "sgd") {
    Job job = gpt_job({.layers = 1, .heads = 2, .width = 16, .length = 8, .vocabulary = 20}, {}, optimizer);
    job.model->to(type);
    return job;
}

inline std::vector<Batch> text_batches(std::int64_t count) {
    std::vector<Batch> batches;
    const Job job = text_job(at::kFloat);
    for (std::int64_t i = 0; i < count; ++i) {
        batches.push_back(job.make_batch(3 + i % 9));  // fewer samples than ranks, and some that do not divide
        mask(batches.back(), static_cast<std::uint64_t>(i));
    }
    return batches;
}

}  // namespace microbatch::test
