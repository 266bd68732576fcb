#pragma once

#include <optional>
#include <string>

#include "cli/commands/job.h"
#include "microbatch/core/plan_report.h"
#include "microbatch/run/run.h"

namespace microbatch::cli {

/// What a run keeps beside its plan: noise is measured, snapshots are in memory, and checkpoints are written from a
/// copy, where there is room for it.
struct Watch {
    std::int64_t noise_every = 0;
    std::optional<SpikeGuardOptions> guard;
    std::optional<RecoveryOptions> recovery;
    RunCheckpointOptions checkpoints;
    std::string guard_line, noise_line, saved_line;  ///< for the reader
};

/// What the options of checkpoints say.
/// Errors: ErrorKind::usage where one cannot be read or contradicts another.
RunCheckpointOptions checkpoint_options_of(const Settings& settings);

/// What goes beside the chosen plan in its budget. Snapshots that do not are files in `folder`.
Watch watch_of(const JobPlan& plan, const PlanReport& report, const std::filesystem::path& folder);

/// What a step holds beside its plan.
struct Beside {
    std::int64_t copy_bytes = 0;  ///< snapshots, and what a checkpoint is written from
    bool noise = false;           ///< a copy of the gradients, from the first micro-batch's end to the last one's
    bool first_step = false;      ///< there is no optimizer state yet beside that copy
};

/// The peak of a run by a plan that was measured, with that beside it.
std::int64_t predicted_peak(const PlanReport& report, const Candidate& plan, const Beside& beside);

}  // namespace microbatch::cli
