#pragma once

#include <c10/core/Device.h>

#include <cstdint>

#include "microbatch/core/plan_report.h"
#include "microbatch/run/run.h"

namespace microbatch {

/// The memory that a step holds in addition to its plan.
struct Beside {
    std::int64_t copy_bytes = 0;  ///< snapshots, and the copy from which a checkpoint is being written
    bool noise = false;       ///< a copy of the gradients, from the end of the first micro-batch to the end of the last
    bool first_step = false;  ///< there is no optimizer state yet
};

/// The peak of a run by a measured plan, including that memory. Requires: the candidate was measured.
std::int64_t predicted_peak(const PlanReport& report, const Candidate& plan, const Beside& beside);

/// The bytes that the first step with a noise measurement needs beyond the budget; 0 or less if it fits.
std::int64_t missing_for_noise(const PlanReport& report);

/// The fastest measured plan with which noise is measured within the budget, or else a quarter of the batch at most.
Plan plan_with_noise(const PlanReport& report);

/// The two snapshots that a run keeps to roll back to, in bytes.
std::int64_t snapshot_bytes_of(const PlanReport& report);

/// Fits a run into the budget next to the chosen plan: noise is measured only if a copy of the gradients fits;
/// snapshots stay in memory, and checkpoints are written from a copy, where there is room. Also sets what follows from
/// the plan: `plan`, `planned_batch`, `state_bytes` and the predictions in `measures`. On a device that is not the CPU,
/// snapshots and copies are in the host's memory, of which they may take half of what is free.
void fit_to_plan(RunOptions& options, const PlanReport& report, at::Device device);

}  // namespace microbatch
