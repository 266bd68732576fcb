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

/// Writes report.html into a run's folder, from its metrics.jsonl, config.toml and summary.json; `more` is added to
/// summary.json. Returns a warning, or an empty text.
/// Errors: ErrorKind::bad_data if the folder is not a run, or one of the files cannot be read; ErrorKind::not_written
///         if a file cannot be written.
std::string write_run_report(const std::filesystem::path& folder, const RunSummary& more = {});

}  // namespace microbatch::cli
