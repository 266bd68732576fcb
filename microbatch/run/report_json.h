#pragma once

#include <cmath>
#include <nlohmann/json.hpp>
#include <vector>

#include "microbatch/run/report.h"

namespace microbatch {

/// Tables and curves as JSON for report.html and summary.json; a y that is not finite is null.
nlohmann::ordered_json to_json(const std::vector<ReportTable>& tables);
nlohmann::ordered_json to_json(const std::vector<ReportCurves>& curves);

/// Reads what to_json() wrote. Throws nlohmann::json::exception if it is something else.
std::vector<ReportTable> tables_from(const nlohmann::json& json);
std::vector<ReportCurves> curves_from(const nlohmann::json& json);

inline nlohmann::ordered_json finite_or_null(double value) {
    return std::isfinite(value) ? nlohmann::ordered_json(value) : nlohmann::ordered_json();
}

}  // namespace microbatch
