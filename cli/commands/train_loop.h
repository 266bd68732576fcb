#pragma once

#include <cstdio>
#include <optional>

#include "cli/commands/checkpoints.h"
#include "cli/commands/job.h"
#include "cli/commands/outcome.h"
#include "cli/commands/resume.h"
#include "cli/commands/watch.h"
#include "microbatch/core/plan_report.h"
#include "microbatch/io/event_file.h"
#include "microbatch/run/run_log.h"

namespace microbatch::cli {

/// MICROBATCH_BUDGET_DRILL="5 20MiB": after step 5 the budget is 20 MiB, to rehearse what a run does then.
class BudgetDrill {
public:
    /// Errors: ErrorKind::usage if the variable is something else.
    BudgetDrill();

    void after(const TrainerReport& report) const;

private:
    std::int64_t step_ = 0, bytes_ = 0;
};

/// A run that is about to be trained.
struct TrainRun {
    std::FILE* out;
    const JobPlan& plan;
    const Job& job;
    const PlanReport& report;
    const Watch& watch;
    Interval length;
    BudgetDrill drill;
    ResumePoint* resume;  ///< null: from the beginning; what it holds is used up
};

/// What a run writes while it goes on.
struct RunFiles {
    RunLog log;
    EventFile events;
    RunCheckpoints checkpoints;
};

/// Trains until the run is done, interrupted, diverged, or out of memory whatever the micro-batch: what came of it is
/// in `outcome` in any case, and the last state in a checkpoint, but for one that diverged.
void train_to_the_end(const TrainRun& run, RunFiles& files, Outcome& outcome);

}  // namespace microbatch::cli
