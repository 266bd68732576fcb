#pragma once

#include <string>

#include "cli/commands/job.h"
#include "microbatch/core/plan_report.h"
#include "microbatch/run/run_memory.h"

namespace microbatch::cli {

/// The parts of a run that watch over it, as fitted into the budget next to its plan.
struct Watch {
    RunOptions options = {};  ///< guard, recovery, noise, checkpoints, and what follows from the plan
    std::string guard_line = {}, noise_line = {}, saved_line = {};  ///< as printed
};

/// The checkpoint options as library options.
/// Errors: ErrorKind::usage if one cannot be parsed or contradicts another.
RunCheckpointOptions checkpoint_options_of(const Settings& settings);

/// Decides what fits in the budget next to the chosen plan. Snapshots that do not fit are files in `folder`.
Watch watch_of(const JobPlan& plan, const PlanReport& report, const std::filesystem::path& folder);

}  // namespace microbatch::cli
