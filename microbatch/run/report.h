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

/// Lines over something else than the steps.
struct ReportCurves {
    std::string title, along;  ///< what it is, and what x is
    std::vector<double> x;
    std::vector<std::pair<std::string, std::vector<double>>> lines = {};  ///< name, y at every x
    std::string note = {};
};

/// What a report tells beside the steps.
struct ReportText {
    std::string title;
    std::string banner = {};                                      ///< above all else; empty: none
    std::vector<std::pair<std::string, std::string>> tiles = {};  ///< name, figure
    std::vector<ReportTable> tables = {};                         ///< such as of strategies
    std::vector<ReportCurves> curves = {};
    std::vector<std::pair<std::string, std::string>> settings = {};  ///< name, value
    std::int64_t budget_bytes = 0;                                   ///< 0: none
};

/// One HTML page of a run, with all that it needs in it: charts of loss, rate, gradient norm, noise, memory and time,
/// what the guard did, tables. Works without a network, dark and light.
///
/// Size: beyond 10,000 steps every n-th is drawn; what the guard did is all there up to 1,000 events.
std::string report_html(const LoggedRun& run, const ReportText& text);

}  // namespace microbatch
