#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "microbatch/run/run_reader.h"

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

/// The content of a report in addition to the steps.
struct ReportText {
    std::string title;
    std::string banner = {};                                      ///< at the top; empty: none
    std::vector<std::pair<std::string, std::string>> tiles = {};  ///< name, value
    std::vector<ReportTable> tables = {};                         ///< for example, of strategies
    std::vector<ReportCurves> curves = {};
    std::vector<std::pair<std::string, std::string>> settings = {};  ///< name, value
    std::int64_t budget_bytes = 0;                                   ///< 0: none
};

/// One self-contained HTML page of a run: charts of loss, rate, gradient norm, noise, memory and time, the actions of
/// the guard, and tables. Works offline, in dark and light mode.
///
/// Size: beyond 10,000 steps, every n-th step is drawn; up to 1,000 actions of the guard are listed.
std::string report_html(const LoggedRun& run, const ReportText& text);

}  // namespace microbatch
