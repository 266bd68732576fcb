#pragma once

#include <cstdint>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "microbatch/run/run_log.h"

namespace microbatch {

/// A table of the report, as text.
struct ReportTable {
    std::string title;
    std::vector<std::string> heading;
    std::vector<std::vector<std::string>> rows;
    std::string note = {};
};

/// Lines over something else than the steps.
struct ReportCurves {
    std::string title, along;  ///< what it is, and what x is
    std::vector<double> x;
    std::vector<std::pair<std::string, std::vector<double>>> lines = {};  ///< name, y at every x
    std::string note = {};
};

/// As report.html and summary.json have them; a y that is not finite is null.
void to_json(nlohmann::ordered_json& json, const ReportTable& table);
void to_json(nlohmann::ordered_json& json, const ReportCurves& curves);

/// summary.json: what log and configuration of a run do not tell.
struct RunSummary {
    std::string banner = {};  ///< how it ended, where not as it should
    std::optional<double> held_out_loss = {};
    std::vector<ReportTable> tables = {};  ///< such as of strategies
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

/// What a report tells beside the steps.
struct ReportText {
    std::string title;
    std::vector<std::pair<std::string, std::string>> tiles = {};     ///< name, figure
    RunSummary summary = {};                                         ///< its banner stands above all else
    std::vector<std::pair<std::string, std::string>> settings = {};  ///< name, value
    std::int64_t budget_bytes = 0;                                   ///< 0: none
};

/// One HTML page of a run, with all that it needs in it: charts of loss, rate, gradient norm, noise, memory and time,
/// what the guard did, tables. Works without a network, dark and light.
///
/// Size: beyond 10,000 steps every n-th is drawn; what the guard did is all there up to 1,000 events.
std::string report_html(const LoggedRun& run, const ReportText& text);

}  // namespace microbatch
