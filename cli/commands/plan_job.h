#pragma once

#include <cstdio>

#include "cli/commands/job.h"
#include "microbatch/step/probe.h"

namespace microbatch::cli {

/// The job, made with what the machine has if the budget is less: so that a budget below the parameters can be
/// explained. The budget that was set comes back.
Job make_job_to_plan(const JobPlan& plan, std::int64_t budget_bytes);

/// Throws ErrorKind::usage where the run is shorter than a batch: what it says of that batch would be of a smaller one.
void require_whole_batch(const JobPlan& plan);

/// Plans the job's batch on the job itself, without a trace: the --micro-batch and --recompute of the settings, or the
/// fastest that fits the budget. On a terminal `progress` shows what is being measured. A whole table is for a reader:
/// see PlannerOptions.
/// Errors: Interrupted if a signal came.
PlanReport plan_job(const JobPlan& plan, const Job& job, std::int64_t budget_bytes, std::FILE* progress,
                    bool whole_table = false);

/// Like plan_job, with as few trials as predict the peak of the whole batch at once.
PlanReport plan_native(const JobPlan& plan, const Job& job, std::int64_t budget_bytes);

/// "in 4 micro-batches of 16, with recompute".
std::string describe_cut(const Candidate& candidate);

}  // namespace microbatch::cli
