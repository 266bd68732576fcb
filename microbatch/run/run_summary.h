#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "microbatch/run/report.h"

namespace microbatch {

/// summary.json: what log and configuration of a run do not tell.
struct RunSummary {
    std::string banner = {};  ///< how it ended, where not as it should
    std::optional<double> held_out_loss = {};
    std::vector<ReportTable> tables = {};
    std::vector<ReportCurves> curves = {};

    bool empty() const { return banner.empty() && !held_out_loss && tables.empty() && curves.empty(); }

    /// This, with what `more` has in the place of its own.
    RunSummary with(const RunSummary& more) const;
};

/// That of the folder; an empty one if it has none.
/// Errors: ErrorKind::bad_data, naming the file, if it is not as write_run_summary() writes it.
RunSummary read_run_summary(const std::filesystem::path& folder);

/// A loss that is not finite is left out. Errors: as write_whole().
void write_run_summary(const std::filesystem::path& folder, const RunSummary& summary);

}  // namespace microbatch
