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

/// Lines over an axis other than the steps.
struct ReportCurves {
    std::string title, along;  ///< the title, and the name of x
    std::vector<double> x;
    std::vector<std::pair<std::string, std::vector<double>>> lines = {};  ///< name, y at every x
    std::string note = {};
};

/// Tables and curves as JSON for report.html and summary.json; a y that is not finite is null.
void to_json(nlohmann::ordered_json& json, const ReportTable& table);
void to_json(nlohmann::ordered_json& json, const ReportCurves& curves);

/// summary.json: what the log and the configuration of a run do not contain.
struct RunSummary {
    std::string banner = {};  ///< how the run ended, if not normally
    std::optional<double> held_out_loss = {};
    std::vector<ReportTable> tables = {};  ///< for example, of strategies
    std::vector<ReportCurves> curves = {};

    bool empty() const { return banner.empty() && !held_out_loss && tables.empty() && curves.empty(); }

    /// A copy in which the values of `more` replace its own.
    RunSummary with(const RunSummary& more) const;
};

/// Reads the summary of the folder; empty if the folder has no summary.
/// Errors: ErrorKind::bad_data, naming the file, if it was not written by write_run_summary().
RunSummary read_run_summary(const std::filesystem::path& folder);

/// Writes the summary, without losses that are not finite. Errors: as write_whole().
void write_run_summary(const std::filesystem::path& folder, const RunSummary& summary);

/// The content of a report in addition to the steps.
struct ReportText {
    std::string title;
    std::vector<std::pair<std::string, std::string>> tiles = {};     ///< name, value
    RunSummary summary = {};                                         ///< its banner is at the top
    std::vector<std::pair<std::string, std::string>> settings = {};  ///< name, value
    std::int64_t budget_bytes = 0;                                   ///< 0: none
};

/// One self-contained HTML page of a run: charts of loss, rate, gradient norm, noise, memory and time, the actions of
/// the guard, and tables. Works offline, in dark and light mode.
///
/// Size: beyond 10,000 steps, every n-th step is drawn; up to 1,000 actions of the guard are listed.
std::string report_html(const LoggedRun& run, const ReportText& text);

}  // namespace microbatch
