#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "microbatch/run/report.h"

namespace microbatch {

/// summary.json: what the log and the configuration of a run do not contain.
struct RunSummary {
    std::string banner = {};  ///< how the run ended, if not normally
    std::optional<double> held_out_loss = {};
    std::vector<ReportTable> tables = {};
    std::vector<ReportCurves> curves = {};

    bool empty() const { return banner.empty() && !held_out_loss && tables.empty() && curves.empty(); }

    /// A copy in which the values of `more` replace its own.
    RunSummary with(const RunSummary& more) const;
};

/// Reads the summary of the folder; empty if there is none.
/// Errors: ErrorKind::bad_data, naming the file, if it was not written by write_run_summary().
RunSummary read_run_summary(const std::filesystem::path& folder);

/// Writes the summary, without losses that are not finite. Errors: as write_whole().
void write_run_summary(const std::filesystem::path& folder, const RunSummary& summary);

}  // namespace microbatch
