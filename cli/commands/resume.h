#pragma once

#include <CLI/App.hpp>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "cli/config.h"
#include "cli/job.h"
#include "cli/run_notes.h"
#include "microbatch/io/checkpoint.h"
#include "cli/commands/job.h"
#include "cli/commands/run_notes.h"
#include "cli/options/config.h"
#include "microbatch/run/checkpoint.h"

namespace microbatch::cli {

/// Where a run's checkpoints are.
std::filesystem::path checkpoints_of(const std::filesystem::path& run);

/// What a run goes on from.
struct ResumePoint {
    Checkpoint checkpoint;
    RunNotes notes;
    std::vector<std::string> warnings;           ///< of checkpoints that were passed over
    std::vector<std::filesystem::path> damaged;  ///< those

    std::int64_t steps() const { return checkpoint.trainer.progress.steps; }
};

/// The newest checkpoint of the --run that is whole, none if there is none; flags of the command that are still open
/// are filled from it, and --micro-batch auto becomes what it was, unless the budget is another one.
/// Requires: the run's folder is locked.
/// Errors: ErrorKind::usage without a --run; ErrorKind::bad_data if there are checkpoints and none is whole, the newest
///         is of another version, or they cannot be read.
std::optional<ResumePoint> find_resume_point(CLI::App& command, Settings& settings);

/// Throws ErrorKind::usage as reconcile() does. The cut may be another one.
void require_same_run(const ResumePoint& point, const RunNotes& now, const Settings& settings);

/// Throws ErrorKind::bad_data, naming the first, where the checkpoint's parameters and buffers are not those of such a
/// model.
void require_same_weights(const ResumePoint& point, const Parameters& weights_of_model);

/// Compares the run with what it was. What changes is said in the lines that it returns, and made good in the point's
/// state: a batch that was left open is begun anew where it is another one, and so is the state of an optimizer that
/// does not take it.
/// Errors: ErrorKind::usage, naming each difference, where model, data, batch, optimizer or seed are others and
///         --resume-changed was not given; ErrorKind::bad_data where the optimizer's state does not fit though nothing
///         is another; `now` is what the notes would be.
std::vector<std::string> reconcile(ResumePoint& point, const RunNotes& now, const Settings& settings,
                                   std::int64_t dataset_size, const Optimizer& optimizer);

}  // namespace microbatch::cli
