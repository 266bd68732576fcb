#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "microbatch/io/report.h"

namespace microbatch::cli {

/// What a run's folder does not tell of itself.
struct RunExtras {
    std::string banner = {};
    std::optional<double> held_out_loss = {};
    std::vector<ReportTable> tables = {};
    std::vector<ReportCurves> curves = {};
};

/// Writes report.html into a run's folder, from its metrics.jsonl and config.toml.
/// Errors: ErrorKind::bad_data if it is no run, or one of the two cannot be read; ErrorKind::usage if the page cannot
/// be
///         written. Returns a warning, or an empty text.
std::string write_run_report(const std::filesystem::path& folder, const RunExtras& extras = {});

}  // namespace microbatch::cli
