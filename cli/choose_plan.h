#pragma once

#include <cstdint>
#include <string>

#include "cli/job.h"

namespace microbatch::cli {

/// How the batch will be cut, and what that was decided on.
struct ChosenPlan {
    std::int64_t micro_batch = 0;
    std::int64_t predicted_peak_bytes = 0;  ///< measured on a job of its own
    std::string why;
};

/// The --micro-batch of the settings, or the fastest measured one that fits the budget.
/// Errors: ErrorKind::does_not_fit if none does; c10::OutOfMemoryError if the one that is named does not.
ChosenPlan choose_plan(const JobPlan& plan, std::int64_t budget_bytes);

}  // namespace microbatch::cli
