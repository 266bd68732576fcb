#pragma once

#include <optional>
#include <string>

#include "cli/job.h"
#include "microbatch/core/plan_report.h"

namespace microbatch::cli {

/// What a run keeps beside its plan: noise is measured, and snapshots are in memory, where there is room for it.
struct Watch {
    std::int64_t noise_every = 0;
    std::optional<SpikeGuardOptions> guard;
    std::optional<RecoveryOptions> recovery;
    std::string guard_line, noise_line;  ///< for the reader
};

/// What goes beside the chosen plan in its budget. Snapshots that do not are files in `folder`.
Watch watch_of(const JobPlan& plan, const PlanReport& report, const std::filesystem::path& folder);

/// The peak of a run by that plan, with such snapshots beside it, and a copy of the gradients in the step that measures
/// noise; in the first step there is no optimizer state beside it.
std::int64_t predicted_peak(const PlanReport& report, std::int64_t snapshot_bytes, bool measures_noise,
                            bool is_first = false);

}  // namespace microbatch::cli
