#pragma once

#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include "microbatch/run/report.h"

namespace microbatch {

/// The settings of a run as text: name, value. The report's title has the `model`, its memory chart the `memory`.
using RunSettings = std::vector<std::pair<std::string, std::string>>;

/// Writes report.html into a run's folder, from its metrics.jsonl and summary.json; `more` is added to summary.json.
/// Returns a warning, or an empty text.
/// Errors: ErrorKind::bad_data if the folder is not a run, or one of the files cannot be read; ErrorKind::not_written
///         if a file cannot be written.
std::string write_run_report(const std::filesystem::path& folder, const RunSettings& settings,
                             const RunSummary& more = {});

}  // namespace microbatch
