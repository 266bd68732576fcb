#include "cli/output.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

namespace microbatch::cli {

void print_table(std::FILE* stream, const std::vector<std::vector<std::string>>& rows) {
    std::vector<std::size_t> widths;
    for (const auto& row : rows) {
        widths.resize(std::max(widths.size(), row.size()));
        for (std::size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
    }
    for (const auto& row : rows) {
        std::string line;
        for (std::size_t i = 0; i < row.size(); ++i) {
            line += i == 0 ? fmt::format("{:<{}}", row[i], widths[i]) : fmt::format("  {:>{}}", row[i], widths[i]);
        }
        line.erase(line.find_last_not_of(' ') + 1);
        fmt::print(stream, "{}\n", line);
    }
}

std::string clock_time(double seconds) {
    if (!std::isfinite(seconds) || seconds < 0.0 || seconds > 1e8) return "-";
    const auto whole = static_cast<std::int64_t>(std::lround(seconds));
    const std::int64_t hours = whole / 3600;
    if (hours > 0) return fmt::format("{}:{:02}:{:02}", hours, whole / 60 % 60, whole % 60);
    return fmt::format("{}:{:02}", whole / 60, whole % 60);
}

}  // namespace microbatch::cli
