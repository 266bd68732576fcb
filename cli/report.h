#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "microbatch/io/report.h"

namespace microbatch::cli {

/// What log and configuration of a run do not tell; summary.json in its folder, where it was written once.
struct RunExtras {
    std::string banner = {};
    std::optional<double> held_out_loss = {};
    std::vector<ReportTable> tables = {};
    std::vector<ReportCurves> curves = {};
};

/// Writes report.html into a run's folder, from its metrics.jsonl, config.toml and summary.json; what `extras` has
/// replaces what stood in the last one.
/// Errors: ErrorKind::bad_data if it is no run, or one of them cannot be read; ErrorKind::usage if the page cannot
/// be
///         written. Returns a warning, or an empty text.
std::string write_run_report(const std::filesystem::path& folder, const RunExtras& extras = {});

}  // namespace microbatch::cli
