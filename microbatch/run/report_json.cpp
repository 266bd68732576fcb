#include "microbatch/run/report_json.h"

#include <limits>

namespace microbatch {

nlohmann::ordered_json to_json(const std::vector<ReportTable>& tables) {
    nlohmann::ordered_json result = nlohmann::ordered_json::array();
    for (const ReportTable& table : tables) {
        result.push_back(
            {{"title", table.title}, {"heading", table.heading}, {"rows", table.rows}, {"note", table.note}});
    }
    return result;
}

nlohmann::ordered_json to_json(const std::vector<ReportCurves>& curves) {
    nlohmann::ordered_json result = nlohmann::ordered_json::array();
    for (const ReportCurves& one : curves) {
        nlohmann::ordered_json lines = nlohmann::ordered_json::array();
        for (const auto& [name, values] : one.lines) {
            nlohmann::ordered_json y = nlohmann::ordered_json::array();
            for (const double value : values) y.push_back(finite_or_null(value));
            lines.push_back({{"name", name}, {"y", y}});
        }
        result.push_back(
            {{"title", one.title}, {"along", one.along}, {"x", one.x}, {"lines", lines}, {"note", one.note}});
    }
    return result;
}

std::vector<ReportTable> tables_from(const nlohmann::json& json) {
    std::vector<ReportTable> result;
    for (const auto& table : json) {
        result.push_back({table.at("title"), table.at("heading"), table.at("rows"), table.at("note")});
    }
    return result;
}

std::vector<ReportCurves> curves_from(const nlohmann::json& json) {
    constexpr double none = std::numeric_limits<double>::quiet_NaN();
    std::vector<ReportCurves> result;
    for (const auto& one : json) {
        ReportCurves curves{one.at("title"), one.at("along"), one.at("x"), {}, one.at("note")};
        for (const auto& line : one.at("lines")) {
            std::vector<double> values;
            for (const auto& y : line.at("y")) values.push_back(y.is_null() ? none : y.get<double>());
            curves.lines.emplace_back(line.at("name").get<std::string>(), std::move(values));
        }
        result.push_back(std::move(curves));
    }
    return result;
}

}  // namespace microbatch
