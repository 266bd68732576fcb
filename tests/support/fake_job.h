#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <optional>
#include <vector>

#include "microbatch/core/planner.h"

namespace microbatch::test {

inline constexpr std::int64_t largest_int64 = std::numeric_limits<std::int64_t>::max();
inline constexpr double infinity = std::numeric_limits<double>::infinity();

inline std::vector<MemoryLine> one_line(double fixed_bytes, double bytes_per_sample) {
    std::vector<MemoryLine> result(1);
    result[0] = {.fixed_bytes = fixed_bytes, .bytes_per_sample = bytes_per_sample};
    return result;
}

/// Memory in bytes: parameters, gradients (created at the end of the first forward), activations; time in seconds.
struct FakeJob final : Rehearsal {
    std::int64_t parameters = 1000;
    std::int64_t gradients = 1000;
    std::int64_t state = 2000;
    std::int64_t update_extra = 10;
    std::vector<MemoryLine> lines = one_line(50, 100);  ///< of the activations
    double recompute_memory = 0.25, recompute_time = 4.0 / 3.0;
    std::function<double(std::int64_t)> time = [](std::int64_t b) { return 1e-3 + 1e-2 * static_cast<double>(b); };
    std::function<std::int64_t(std::int64_t)> surprise = [](std::int64_t) { return 0; };  ///< bytes off the lines
    std::function<std::size_t()> extra_allocations = [] { return 0; };
    double update_seconds = 2e-3;
    std::int64_t batch = 1;
    std::int64_t out_of_memory_from = largest_int64;  ///< micro-batch
    std::int64_t fewest = 1;                          ///< samples that can be trained on

    std::vector<Plan> asked = {};
    int updates = 0;
    int timed_again = 0;
    std::vector<std::int64_t> allowed = {};  ///< bytes, of each that was asked
    double optional_seconds = 0;

    MemoryProfile activations(const Plan& plan) const {
        MemoryProfile result;
        for (const MemoryLine& line : lines) {
            const double scale = plan.recompute ? recompute_memory : 1.0;
            result.push_back(static_cast<std::int64_t>(line.fixed_bytes + scale * line.bytes_per_sample *
                                                                              static_cast<double>(plan.micro_batch)));
        }
        return result;
    }

    MicroBatchTrial trial(const Plan& plan, bool cut) {
        MicroBatchTrial result{.first = {}};
        const std::int64_t off = surprise(plan.micro_batch);
        for (const std::int64_t bytes : activations(plan)) {
            result.first.push_back(parameters + bytes + off);
            if (cut) result.later.push_back(parameters + gradients + bytes + off);
        }
        result.first.push_back(parameters + gradients);
        if (cut) result.later.push_back(parameters + gradients);
        for (std::size_t i = extra_allocations(); i > 0; --i) result.first.push_back(parameters);
        result.seconds = seconds(plan, plan.micro_batch);
        result.spent_seconds = (cut ? 2 : 1) * result.seconds;
        return result;
    }

    double seconds(const Plan& plan, std::int64_t size) const {
        return time(size) * (plan.recompute ? recompute_time : 1);
    }

    double step_seconds(const Plan& plan) const {
        const std::int64_t rest = batch % plan.micro_batch;
        return static_cast<double>(batch / plan.micro_batch) * seconds(plan, plan.micro_batch) +
               (rest > 0 ? seconds(plan, rest) : 0.0) + update_seconds;
    }

    std::int64_t update_peak() const { return parameters + gradients + state + update_extra; }

    /// Of a run of two steps or more.
    std::int64_t true_peak(const Plan& plan) {
        const MicroBatchTrial one = trial(plan, plan.micro_batch < batch);
        return std::max(std::max(peak_of(one.first), peak_of(one.later)) + state, update_peak());
    }

    std::optional<MicroBatchTrial> micro_batch(const Plan& plan, bool cut, std::int64_t allowed_bytes) override {
        EXPECT_EQ(cut, plan.micro_batch < batch);
        for (std::size_t i = 0; i < asked.size(); ++i) {
            EXPECT_TRUE(asked[i] != plan || allowed[i] < allowed_bytes) << plan.micro_batch << " was tried twice";
        }
        asked.push_back(plan);
        allowed.push_back(allowed_bytes);
        if (plan.micro_batch < fewest) throw TooFewSamples(ErrorKind::usage, "too few samples");
        if (plan.micro_batch >= out_of_memory_from) return std::nullopt;
        const MicroBatchTrial result = trial(plan, cut);
        if (std::max(peak_of(result.first), peak_of(result.later)) > allowed_bytes) return std::nullopt;
        if (plan.micro_batch > 2) optional_seconds += result.spent_seconds;
        return result;
    }

    double seconds_again(const Plan& plan, bool cut, std::int64_t) override {
        EXPECT_EQ(cut, plan.micro_batch < batch);
        EXPECT_TRUE(was_asked(plan.micro_batch, plan.recompute)) << plan.micro_batch << " is timed again but never was";
        const double seconds = this->seconds(plan, plan.micro_batch);
        ++timed_again;
        if (plan.micro_batch > 2) optional_seconds += (cut ? 2 : 1) * seconds;
        return seconds;
    }

    std::optional<UpdateTrial> update(std::int64_t allowed_bytes) override {
        ++updates;
        if (update_peak() > allowed_bytes) return std::nullopt;
        return UpdateTrial{.first_peak_bytes = update_peak(),
                           .later_peak_bytes = update_peak(),
                           .state_bytes = state,
                           .seconds = update_seconds,
                           .spent_seconds = 2 * update_seconds};
    }

    MemoryParts fixed() const override { return {.parameters = parameters, .gradients = gradients}; }

    bool was_asked(std::int64_t size, bool recompute) const {
        return std::count(asked.begin(), asked.end(), Plan{.micro_batch = size, .recompute = recompute}) > 0;
    }
};

inline PlanReport plan(FakeJob& job, PlannerOptions options) {
    job.batch = options.batch;
    return make_plan(options, job);
}

/// True if the plan leaves no micro-batch of too few samples when the batch is split.
inline bool is_possible(const FakeJob& job, std::int64_t micro_batch) {
    const std::int64_t count = micro_batch_count(job.batch, micro_batch);
    return micro_batch >= job.fewest && micro_batch_slice(job.batch, micro_batch, count - 1).size() >= job.fewest;
}

/// The smallest step time of all plans that fit, each measured; infinity if none does.
inline double best_of_all(FakeJob& job, const PlannerOptions& options) {
    double best = infinity;
    for (const bool recompute : {false, true}) {
        if (recompute ? !options.offers_recompute : options.recompute == Recompute::always) continue;
        for (std::int64_t size = 1; size <= options.batch; ++size) {
            const Plan one{.micro_batch = size, .recompute = recompute};
            if (!is_possible(job, size)) continue;
            if (job.true_peak(one) <= options.budget_bytes) best = std::min(best, job.step_seconds(one));
        }
    }
    return best;
}

/// Properties of every report, for any job.
inline void expect_sound(const FakeJob& job, const PlannerOptions& options, const PlanReport& report) {
    EXPECT_LE(job.asked.size(), 110U);
    EXPECT_TRUE(std::isfinite(report.spent_seconds));
    EXPECT_FALSE(report.why.empty());
    if (!report.chosen) return;
    const Candidate& chosen = report.choice();
    EXPECT_TRUE(chosen.fits);
    EXPECT_TRUE(is_possible(job, chosen.plan.micro_batch)) << chosen.plan.micro_batch;
    ASSERT_TRUE(chosen.measured);
    EXPECT_LE(chosen.measured->largest(), options.budget_bytes);
    EXPECT_EQ(chosen.micro_batches, micro_batch_count(options.batch, chosen.plan.micro_batch));
    EXPECT_TRUE(job.was_asked(chosen.plan.micro_batch, chosen.plan.recompute));
}

/// Fixed overhead, per sample, and a slow rise once a cache is full.
inline std::function<double(std::int64_t)> curve(double overhead, double cache, double rise) {
    return [=](std::int64_t size) {
        const auto b = static_cast<double>(size);
        return overhead + 1e-2 * b * (1 + (b > cache ? rise * std::log2(b / cache) : 0.0));
    };
}

}  // namespace microbatch::test
