#include <limits>
#include <nlohmann/json.hpp>

#include "microbatch/io/file_system.h"
#include "microbatch/io/input_file.h"
#include "microbatch/io/json.h"
#include "microbatch/run/report.h"

namespace microbatch {
namespace {

constexpr const char* file_name = "summary.json";

ReportTable table_from(const nlohmann::json& json) {
    return {json.at("title"), json.at("heading"), json.at("rows"), json.at("note")};
}

ReportCurves curves_from(const nlohmann::json& json) {
    ReportCurves curves{json.at("title"), json.at("along"), json.at("x"), {}, json.at("note")};
    for (const auto& line : json.at("lines")) {
        std::vector<double>& values =
            curves.lines.emplace_back(line.at("name").get<std::string>(), std::vector<double>()).second;
        for (const auto& y : line.at("y")) {
            values.push_back(y.is_null() ? std::numeric_limits<double>::quiet_NaN() : y.get<double>());
        }
    }
    return curves;
}

RunSummary summary_from(const nlohmann::json& json) {
    RunSummary summary{.banner = json.at("banner")};
    if (const auto& loss = json.at("held_out_loss"); !loss.is_null()) summary.held_out_loss = loss.get<double>();
    for (const auto& table : json.at("tables")) summary.tables.push_back(table_from(table));
    for (const auto& curves : json.at("curves")) summary.curves.push_back(curves_from(curves));
    return summary;
}

}  // namespace

// A number that is not finite becomes null when it is written as text.
void to_json(nlohmann::ordered_json& json, const ReportTable& table) {
    json = {{"title", table.title}, {"heading", table.heading}, {"rows", table.rows}, {"note", table.note}};
}

void to_json(nlohmann::ordered_json& json, const ReportCurves& curves) {
    nlohmann::ordered_json lines = nlohmann::ordered_json::array();
    for (const auto& [name, y] : curves.lines) lines.push_back({{"name", name}, {"y", y}});
    json = {{"title", curves.title}, {"along", curves.along}, {"x", curves.x}, {"lines", lines}, {"note", curves.note}};
}

RunSummary RunSummary::with(const RunSummary& more) const {
    return {.banner = more.banner.empty() ? banner : more.banner,
            .held_out_loss = more.held_out_loss ? more.held_out_loss : held_out_loss,
            .tables = more.tables.empty() ? tables : more.tables,
            .curves = more.curves.empty() ? curves : more.curves};
}

RunSummary read_run_summary(const std::filesystem::path& folder) {
    constexpr std::uint64_t most_bytes = std::uint64_t{64} << 20U;
    constexpr std::size_t most_values = 4'000'000;
    const std::filesystem::path path = folder / file_name;
    if (!std::filesystem::exists(path)) return {};
    return read_json(InputFile(path).read_all(most_bytes), most_values, path.string(), " was not written by `train`",
                     summary_from);
}

void write_run_summary(const std::filesystem::path& folder, const RunSummary& summary) {
    nlohmann::ordered_json json;
    json["banner"] = summary.banner;
    json["held_out_loss"] = summary.held_out_loss ? nlohmann::ordered_json(*summary.held_out_loss) : nullptr;
    json["tables"] = summary.tables;
    json["curves"] = summary.curves;
    write_whole(folder / file_name, json.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n");
}

}  // namespace microbatch
