#pragma once

#include <cstdio>
#include <filesystem>

#include "cli/commands/watch.h"
#include "cli/print/progress.h"
#include "microbatch/run/outcome.h"

namespace microbatch::cli {

/// Prints what the run is going to do.
void print_header(std::FILE* out, const JobPlan& plan, const PlanReport& report, const Watch& watch, Interval length,
                  const std::filesystem::path& folder);

/// Prints a line for each rare event that happened in the step. Without recovery, nothing is rolled back.
void note_step(ProgressLine& progress, const TrainerReport& report, const std::optional<RecoveryOptions>& recovery);

/// Prints the results; `folder` is the folder of the run.
void print_summary(std::FILE* out, const JobPlan& plan, const PlanReport& report, const Watch& watch,
                   const Outcome& outcome, const std::filesystem::path& folder);
/// Prints how to continue an interrupted run.
void print_way_on(std::FILE* out, const Outcome& outcome, const std::filesystem::path& folder);
void print_json(const JobPlan& plan, const PlanReport& report, const Outcome& outcome,
                const std::filesystem::path& folder);

/// The first message for readers of the report; empty if all went well.
std::string banner_of(const Outcome& outcome, const Settings& settings);

/// Throws ErrorKind::stopped if the run diverged or ended worse than it began, saying where and what to do.
void report_divergence(const Outcome& outcome, const Settings& settings);

}  // namespace microbatch::cli
