#pragma once

#include "cli/commands/job.h"
#include "cli/commands/ranks.h"

namespace microbatch::cli {

/// plan_job() of a run over these ranks, which decides whether the optimizer's state is sharded, as --shard-optimizer says.
/// With auto, two plans are made where memory limits the first. All ranks. Errors: as plan_job().
PlanReport plan_over_ranks(JobPlan& plan, const Job& job, std::int64_t budget_bytes, std::FILE* progress,
                           const Ranks& ranks);

}  // namespace microbatch::cli
