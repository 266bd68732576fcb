#pragma once

#include <filesystem>
#include <string>

#include "microbatch/run/run_summary.h"

namespace microbatch::cli {

/// Writes report.html into a run's folder, from its metrics.jsonl, config.toml and summary.json; `more` is added to
/// summary.json. Returns a warning, or an empty text.
/// Errors:   ErrorKind::bad_data if the folder is not a run, or one of the files cannot be read; ErrorKind::usage if a
///           file cannot be written.
std::string write_run_report(const std::filesystem::path& folder, const RunSummary& more = {});

}  // namespace microbatch::cli
