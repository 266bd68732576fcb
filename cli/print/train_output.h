#pragma once

#include <cstdio>
#include <filesystem>

#include "cli/commands/watch.h"
#include "cli/print/progress.h"
#include "microbatch/run/outcome.h"

namespace microbatch::cli {

/// What is going to be done, before it is.
void print_header(std::FILE* out, const JobPlan& plan, const PlanReport& report, const Watch& watch, Interval length,
                  const std::filesystem::path& folder);

/// A line for what seldom happens in a step, where it did. Without recovery nothing goes back.
void note_step(ProgressLine& progress, const TrainerReport& report, const std::optional<RecoveryOptions>& recovery);

/// What came of it; `folder` is what was written to.
void print_summary(std::FILE* out, const JobPlan& plan, const PlanReport& report, const Watch& watch,
                   const Outcome& outcome, const std::filesystem::path& folder);
/// How to go on with a run that was stopped.
void print_way_on(std::FILE* out, const Outcome& outcome, const std::filesystem::path& folder);
void print_json(const JobPlan& plan, const PlanReport& report, const Outcome& outcome,
                const std::filesystem::path& folder);

/// What the report's reader should see first; empty if all went well.
std::string banner_of(const Outcome& outcome, const Settings& settings);

/// Judges how the run ended, by its held-out loss and the steps in the folder's log that were applied and not undone:
/// see ends_worse().
void judge_end(Outcome& outcome, const std::filesystem::path& folder);

/// Throws ErrorKind::stopped if the run diverged or ended worse than it began, saying where and what to do.
void report_divergence(const Outcome& outcome, const Settings& settings);

}  // namespace microbatch::cli
