#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "cli/job.h"

namespace microbatch::cli {

/// How the batch will be cut, and what that was decided on.
struct ChosenPlan {
    std::int64_t micro_batch = 0;
    std::optional<std::int64_t> predicted_peak_bytes;  ///< none for a micro-batch that the user named
    std::string why;
};

/// The --micro-batch of the settings, or the fastest measured one that fits the budget.
/// Errors: ErrorKind::does_not_fit if none does.
ChosenPlan choose_plan(const JobPlan& plan, std::int64_t budget_bytes);

}  // namespace microbatch::cli
