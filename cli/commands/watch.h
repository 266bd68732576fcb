#pragma once

#include <optional>
#include <string>

#include "cli/commands/job.h"
#include "microbatch/core/plan_report.h"
#include "microbatch/run/run.h"

namespace microbatch::cli {

/// The memory of a run in addition to its plan: where it fits, noise is measured, snapshots stay in memory, and
/// checkpoints are written from a copy.
struct Watch {
    std::int64_t noise_every = 0;
    std::optional<SpikeGuardOptions> guard;
    std::optional<RecoveryOptions> recovery;
    RunCheckpointOptions checkpoints;
    std::string guard_line, noise_line, saved_line;  ///< as printed
};

/// The checkpoint options as library options.
/// Errors: ErrorKind::usage if one cannot be parsed or contradicts another.
RunCheckpointOptions checkpoint_options_of(const Settings& settings);

/// Decides what fits in the budget next to the chosen plan. Snapshots that do not fit are files in `folder`.
Watch watch_of(const JobPlan& plan, const PlanReport& report, const std::filesystem::path& folder);

/// The memory that a step holds in addition to its plan.
struct Beside {
    std::int64_t copy_bytes = 0;  ///< snapshots, and the copy from which a checkpoint is being written
    bool noise = false;       ///< a copy of the gradients, from the end of the first micro-batch to the end of the last
    bool first_step = false;  ///< there is no optimizer state yet
};

/// The peak of a run by a measured plan, including that memory.
std::int64_t predicted_peak(const PlanReport& report, const Candidate& plan, const Beside& beside);

}  // namespace microbatch::cli
