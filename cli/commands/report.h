#pragma once

#include <filesystem>
#include <string>

#include "microbatch/run/run_summary.h"

namespace microbatch::cli {

/// Writes report.html into a run's folder, from its metrics.jsonl, config.toml and summary.json; what `more` has goes
/// into the last. Returns: a warning, or an empty text. Errors:  ErrorKind::bad_data if it is no run, or one of them
/// cannot be read; ErrorKind::usage if a file cannot be
///          written.
std::string write_run_report(const std::filesystem::path& folder, const RunSummary& more = {});

}  // namespace microbatch::cli
