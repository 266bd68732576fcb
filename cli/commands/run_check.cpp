#include "cli/commands/run_check.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <vector>

#include "cli/print/output.h"
#include "microbatch/core/batch_plan.h"
#include "microbatch/core/error.h"
#include "microbatch/core/units.h"
#include "microbatch/run/run_reader.h"

namespace microbatch::cli {
namespace {

// The steps of a run under one plan.
struct Steps {
    Plan plan;
    std::int64_t count = 0;
    std::int64_t out_of_memory = 0;
    std::int64_t peak_bytes = 0;
    std::optional<std::int64_t> predicted_peak_bytes;
    std::vector<double> seconds, predicted_for;  // of all steps; of those with a predicted time
    std::optional<double> predicted_seconds;

    void add(const Steps& more) {
        count += more.count;
        out_of_memory += more.out_of_memory;
        peak_bytes = std::max(peak_bytes, more.peak_bytes);
        // The memory beyond the plan varies between steps; the peak is at the largest.
        if (more.predicted_peak_bytes) {
            predicted_peak_bytes = std::max(predicted_peak_bytes.value_or(0), *more.predicted_peak_bytes);
        }
        if (!predicted_seconds) predicted_seconds = more.predicted_seconds;
        seconds.insert(seconds.end(), more.seconds.begin(), more.seconds.end());
        predicted_for.insert(predicted_for.end(), more.predicted_for.begin(), more.predicted_for.end());
    }

    double median_seconds() const { return median(predicted_for.empty() ? seconds : predicted_for); }
};

Steps steps_of(const StepRecord& step) {
    return {.plan = {step.micro_batch, step.recompute},
            .count = 1,
            .out_of_memory = step.out_of_memory,
            .peak_bytes = step.peak_bytes,
            .predicted_peak_bytes = step.predicted_peak_bytes,
            .seconds = {step.step_seconds},
            .predicted_for = step.predicted_step_seconds ? std::vector{step.step_seconds} : std::vector<double>{},
            .predicted_seconds = step.predicted_step_seconds};
}

std::vector<Steps> read_run(const std::string& folder) {
    const LoggedRun run = read_run_log(folder);
    if (run.cut) {
        throw Error(ErrorKind::bad_data,
                    fmt::format("--run {}: metrics.jsonl ends in the middle of line {}", folder, run.steps.size() + 1));
    }
    std::map<std::pair<std::int64_t, bool>, Steps> by_plan;
    for (const StepRecord& one : run.steps) {
        const Steps step = steps_of(one);
        const auto [found, is_new] = by_plan.try_emplace({step.plan.micro_batch, step.plan.recompute}, step);
        if (!is_new) found->second.add(step);
    }
    std::vector<Steps> result;
    for (auto& [plan, steps] : by_plan) result.push_back(std::move(steps));
    return result;
}

void print_run(const std::vector<Steps>& run) {
    std::vector<std::vector<std::string>> rows{{"steps", "micro-batch", "recompute", "predicted peak", "measured peak",
                                                "", "predicted time", "measured time", "", "out of memory"}};
    for (const Steps& steps : run) {
        const double seconds = steps.median_seconds();
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
        row["predicted_peak_bytes"] =
            steps.predicted_peak_bytes ? nlohmann::ordered_json(*steps.predicted_peak_bytes) : nullptr;
        row["measured_peak_bytes"] = steps.peak_bytes;
        row["predicted_step_seconds"] =
            steps.predicted_seconds ? nlohmann::ordered_json(*steps.predicted_seconds) : nullptr;
        row["measured_step_seconds"] = steps.median_seconds();
        row["out_of_memory"] = steps.out_of_memory;
        document.push_back(row);
    }
    print(stdout, "{}\n", document.dump(2));
}

}  // namespace

int check_run(const std::string& folder, bool json) {
    const std::vector<Steps> run = read_run(folder);
    json ? print_json(run) : print_run(run);
    return 0;
}

}  // namespace microbatch::cli
