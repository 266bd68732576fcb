#include "cli/commands/sharding.h"

#include <algorithm>
#include <utility>

namespace microbatch::cli {
namespace {

// The time of a step is noisy: sharding has to be worth it.
constexpr double worthwhile = 0.99;

// Whether a faster plan might fit if there was less state. Plans with recompute are not tried where others fit.
bool is_limited(const PlanReport& report) {
    if (!report.chosen || report.choice().plan.recompute) return true;
    return std::ranges::any_of(report.candidates,
                               [](const Candidate& one) { return !one.fits && !one.plan.recompute; });
}

}  // namespace

PlanReport plan_over_ranks(JobPlan& plan, const Job& job, std::int64_t budget_bytes, std::FILE* progress,
                           const Ranks& ranks) {
    Accumulator& accumulator = *job.accumulator;
    const auto plan_with = [&](bool sharded) {
        accumulator.shard_optimizer(sharded);
        plan.communication_seconds = accumulator.reducer().exchange_seconds(accumulator.parameters());
        return plan_job(plan, job, budget_bytes, progress);
    };
    const std::string& how = plan.settings.shard_optimizer;
    if (how == "yes") return plan_with(true);
    PlanReport whole = plan_with(false);
    if (how == "no" || !ranks.any(ranks.size() > 1 && is_limited(whole))) return whole;
    PlanReport sharded = plan_with(true);
    const bool whole_fits = !ranks.any(!whole.chosen), sharded_fits = !ranks.any(!sharded.chosen);
    const bool is_faster =
        whole.chosen && sharded.chosen && sharded.choice().step_seconds < worthwhile * whole.choice().step_seconds;
    // By the first rank's times.
    if (!whole_fits || (sharded_fits && ranks.any(ranks.is_first() && is_faster))) return sharded;
    accumulator.shard_optimizer(false);
    return whole;
}

}  // namespace microbatch::cli
