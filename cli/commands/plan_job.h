#pragma once

#include <cstdio>

#include "cli/commands/job.h"
#include "microbatch/step/probe.h"

namespace microbatch::cli {

/// Creates the job with all the memory of the machine, so that a budget smaller than the parameters can be explained.
/// Restores the budget afterwards.
Job make_job_to_plan(const JobPlan& plan, std::int64_t budget_bytes);

/// Throws ErrorKind::usage if the run is shorter than a batch, because a plan for that batch would not apply.
void require_whole_batch(const JobPlan& plan);

/// Plans the job's batch on the job itself, without side effects: the --micro-batch and --recompute of the settings, or
/// the fastest plan that fits in the budget. `progress` shows what is being measured. A complete table is for readers:
/// see PlannerOptions.
/// Errors: Interrupted if a signal came.
PlanReport plan_job(const JobPlan& plan, const Job& job, std::int64_t budget_bytes, std::FILE* progress,
                    bool whole_table = false);

/// Like plan_job(), with only the trials needed to predict the peak of the whole batch in one piece.
PlanReport plan_native(const JobPlan& plan, const Job& job, std::int64_t budget_bytes);

/// "in 4 micro-batches of 16, with recompute".
std::string describe_cut(const Candidate& candidate);

}  // namespace microbatch::cli
