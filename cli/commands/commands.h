#pragma once

#include <filesystem>

#include "cli/options/command_line.h"
#include "microbatch/run/report.h"

namespace microbatch::cli {

CommandSpec train_command();
CommandSpec compare_command();
CommandSpec advise_command();
CommandSpec plan_command();
CommandSpec report_command();
CommandSpec doctor_command();

/// Writes report.html into a run's folder, from its metrics.jsonl, config.toml and summary.json; what `more` has goes
/// into the last. Returns a warning, or an empty text.
/// Errors: ErrorKind::bad_data if it is no run, or one of them cannot be read; ErrorKind::not_written if a file cannot
///         be written.
std::string write_run_report(const std::filesystem::path& folder, const RunSummary& more = {});

}  // namespace microbatch::cli
