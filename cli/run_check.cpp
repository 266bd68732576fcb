#include "cli/run_check.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <vector>

#include "cli/output.h"
#include "microbatch/core/batch_plan.h"
#include "microbatch/core/error.h"
#include "microbatch/core/units.h"

namespace microbatch::cli {
namespace {

// The steps of a run that one plan made.
struct Steps {
    Plan plan;
    std::int64_t count = 0;
    std::int64_t out_of_memory = 0;
    std::int64_t peak_bytes = 0;
    std::optional<std::int64_t> predicted_peak_bytes;
    std::vector<double> seconds;
    std::optional<double> predicted_seconds;

    void add(const Steps& more) {
        count += more.count;
        out_of_memory += more.out_of_memory;
        peak_bytes = std::max(peak_bytes, more.peak_bytes);
        if (!predicted_peak_bytes) predicted_peak_bytes = more.predicted_peak_bytes;
        if (!predicted_seconds) predicted_seconds = more.predicted_seconds;
        seconds.insert(seconds.end(), more.seconds.begin(), more.seconds.end());
    }
};

// None if the line is not a step.
std::optional<Steps> read_step(const std::string& text) {
    try {
        const auto line = nlohmann::json::parse(text);
        Steps step{.plan = {line.at("micro_batch").get<std::int64_t>(), line.at("recompute").get<bool>()},
                   .count = 1,
                   .out_of_memory = line.at("out_of_memory").get<std::int64_t>(),
                   .peak_bytes = line.at("peak_bytes").get<std::int64_t>(),
                   .predicted_peak_bytes = {},
                   .seconds = {line.at("step_seconds").get<double>()},
                   .predicted_seconds = {}};
        if (!line.at("predicted_peak_bytes").is_null()) step.predicted_peak_bytes = line["predicted_peak_bytes"];
        if (!line.at("predicted_step_seconds").is_null()) step.predicted_seconds = line["predicted_step_seconds"];
        const bool sound = step.peak_bytes > 0 && step.seconds.front() > 0.0 && step.plan.micro_batch > 0;
        return sound ? std::optional(step) : std::nullopt;
    } catch (const nlohmann::json::exception&) {
        return std::nullopt;
    }
}

std::vector<Steps> read_run(const std::string& folder) {
    const std::filesystem::path path = std::filesystem::path(folder) / "metrics.jsonl";
    std::ifstream file(path);
    if (!file) throw Error(ErrorKind::bad_data, fmt::format("--run {}: there is no {}", folder, path.string()));
    std::map<std::pair<std::int64_t, bool>, Steps> by_plan;
    std::string text;
    for (std::int64_t number = 1; std::getline(file, text); ++number) {
        const std::optional<Steps> step = read_step(text);
        if (!step) {
            throw Error(ErrorKind::bad_data,
                        fmt::format("{} line {} is not a step as `train` writes it", path.string(), number));
        }
        const auto [found, is_new] = by_plan.try_emplace({step->plan.micro_batch, step->plan.recompute}, *step);
        if (!is_new) found->second.add(*step);
    }
    if (by_plan.empty()) throw Error(ErrorKind::bad_data, fmt::format("{} holds no step", path.string()));
    std::vector<Steps> result;
    for (auto& [plan, steps] : by_plan) result.push_back(std::move(steps));
    return result;
}

void print_run(const std::vector<Steps>& run) {
    std::vector<std::vector<std::string>> rows{{"steps", "micro-batch", "recompute", "predicted peak", "measured peak",
                                                "", "predicted time", "measured time", "", "out of memory"}};
    for (const Steps& steps : run) {
        const double seconds = median(steps.seconds);
        const auto& peak = steps.predicted_peak_bytes;
        const auto& time = steps.predicted_seconds;
        rows.push_back({format_count(steps.count), std::to_string(steps.plan.micro_batch),
                        steps.plan.recompute ? "yes" : "no", peak ? format_bytes(*peak) : "-",
                        format_bytes(steps.peak_bytes),
                        peak ? percent_off(static_cast<double>(*peak), static_cast<double>(steps.peak_bytes)) : "",
                        time ? fmt::format("{:.3f} s", *time) : "-", fmt::format("{:.3f} s", seconds),
                        time ? percent_off(*time, seconds) : "", std::to_string(steps.out_of_memory)});
    }
    print_table(stdout, rows);
}

void print_json(const std::vector<Steps>& run) {
    nlohmann::ordered_json document = nlohmann::ordered_json::array();
    for (const Steps& steps : run) {
        nlohmann::ordered_json row;
        row["steps"] = steps.count;
        row["micro_batch"] = steps.plan.micro_batch;
        row["recompute"] = steps.plan.recompute;
        row["predicted_peak_bytes"] = nullptr;
        if (steps.predicted_peak_bytes) row["predicted_peak_bytes"] = *steps.predicted_peak_bytes;
        row["measured_peak_bytes"] = steps.peak_bytes;
        row["predicted_step_seconds"] = nullptr;
        if (steps.predicted_seconds) row["predicted_step_seconds"] = *steps.predicted_seconds;
        row["measured_step_seconds"] = median(steps.seconds);
        row["out_of_memory"] = steps.out_of_memory;
        document.push_back(row);
    }
    fmt::print("{}\n", document.dump(2));
}

}  // namespace

int check_run(const std::string& folder, bool json) {
    const std::vector<Steps> run = read_run(folder);
    json ? print_json(run) : print_run(run);
    return 0;
}

}  // namespace microbatch::cli
