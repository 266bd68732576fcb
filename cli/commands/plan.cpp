#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cli/commands/commands.h"
#include "cli/commands/job.h"
#include "cli/commands/process.h"
#include "cli/print/output.h"
#include "microbatch/core/error.h"
#include "microbatch/core/units.h"
#include "microbatch/io/json.h"
#include "microbatch/memory/budget_allocator.h"
#include "microbatch/run/run_log.h"

namespace microbatch::cli {
namespace {

std::optional<std::int64_t> largest(const std::optional<PhasePeaks>& peaks) {
    return peaks ? std::optional(peaks->largest()) : std::nullopt;
}

std::string bytes_or_dash(const std::optional<std::int64_t>& bytes) {
    return bytes ? format_bytes(*bytes) : "-";
}

std::string seconds_or_dash(const Candidate& candidate) {
    if (candidate.step_seconds == 0.0) return "-";
    return fmt::format("{:.3f} s{}", candidate.step_seconds, candidate.time_measured ? "" : " predicted");
}

void print_candidates(const PlanReport& report) {
    std::vector<std::vector<std::string>> rows{
        {"", "micro-batch", "micro-batches", "recompute", "predicted peak", "measured peak", "time per step", "fits"}};
    for (std::size_t i = 0; i < report.candidates.size(); ++i) {
        const Candidate& candidate = report.candidates[i];
        const bool known = candidate.predicted || candidate.measured;
        rows.push_back({report.chosen == i ? "chosen" : "", std::to_string(candidate.plan.micro_batch),
                        std::to_string(candidate.micro_batches), candidate.plan.recompute ? "yes" : "no",
                        bytes_or_dash(largest(candidate.predicted)), bytes_or_dash(largest(candidate.measured)),
                        seconds_or_dash(candidate), known ? (candidate.fits ? "yes" : "no") : "-"});
    }
    print_table(stdout, rows);
}

using Named = std::vector<std::pair<std::string, std::int64_t>>;

Named phases_of(const PhasePeaks& peaks) {
    return {{"first micro-batch", peaks.first_micro_batch},
            {"later micro-batches", peaks.later_micro_batches},
            {"first update", peaks.first_update},
            {"later updates", peaks.later_updates}};
}

void print_bytes(const char* title, const Named& rows) {
    print(stdout, "\n{}\n", title);
    for (const auto& [name, bytes] : rows) {
        if (bytes > 0) print(stdout, "  {:<22} {}\n", name, format_bytes(bytes));
    }
}

void print_report(const JobPlan& plan, const PlanReport& report) {
    print(stdout, "model   {}\n", plan.model_description);
    print_data(stdout, plan.data, 8);
    print(stdout, "batch   {} samples per step, memory budget {}\n\n", report.batch, format_bytes(report.budget_bytes));
    print_candidates(report);
    if (report.chosen) {
        const Candidate& chosen = report.choice();
        print(stdout, "\nchosen  {}: {}\n", describe_cut(chosen), report.why);
        if (!report.batch_norm.empty()) print(stdout, "norm    BatchNorm {}\n", report.batch_norm);
        if (const auto layers = replaced_norms(plan)) print(stdout, "norm    {}\n", *layers);
        print_bytes("predicted peak by phase", phases_of(chosen.measured ? *chosen.measured : *chosen.predicted));
        print_bytes("predicted peak by part", named(parts_of(report, chosen)));
    }
    print(stdout, "\npredictions were within {:.1f} % of the measured peaks{}; measuring took {:.1f} s\n",
          100.0 * report.worst_relative_error,
          report.affine ? "" : ": the model allocates differently at different sizes", report.spent_seconds);
}

nlohmann::ordered_json to_json(const Named& rows) {
    nlohmann::ordered_json json;
    for (auto [name, bytes] : rows) {
        std::replace(name.begin(), name.end(), ' ', '_');
        std::replace(name.begin(), name.end(), '-', '_');
        json[name] = bytes;
    }
    return json;
}

nlohmann::ordered_json to_json(const PlanReport& report, const Candidate& candidate) {
    const std::optional<PhasePeaks>& peaks = candidate.measured ? candidate.measured : candidate.predicted;
    return {{"micro_batch", candidate.plan.micro_batch},
            {"micro_batches", candidate.micro_batches},
            {"recompute", candidate.plan.recompute},
            {"predicted_peak_bytes", json_value(largest(candidate.predicted))},
            {"measured_peak_bytes", json_value(largest(candidate.measured))},
            {"phases", peaks ? to_json(phases_of(*peaks)) : nullptr},
            {"parts", peaks ? to_json(named(parts_of(report, candidate))) : nullptr},
            {"step_seconds", candidate.step_seconds > 0.0 ? json_value(candidate.step_seconds) : nullptr},
            {"time_measured", candidate.time_measured},
            {"fits", candidate.fits}};
}

void print_json(const JobPlan& plan, const PlanReport& report) {
    const Candidate* chosen = report.chosen ? &report.choice() : nullptr;
    nlohmann::ordered_json document{
        {"model", plan.model},
        {"batch", report.batch},
        {"budget_bytes", report.budget_bytes},
        {"fits", chosen != nullptr},
        {"micro_batch", chosen ? json_value(chosen->plan.micro_batch) : nullptr},
        {"micro_batches", chosen ? json_value(chosen->micro_batches) : nullptr},
        {"recompute", chosen ? json_value(chosen->plan.recompute) : nullptr},
        {"batch_norm",
         report.batch_norm.empty() || chosen == nullptr ? nullptr : json_value(to_string(chosen->plan.batch_norm))},
        {"why", report.why},
        {"affine", report.affine},
        {"worst_relative_error", report.worst_relative_error},
        {"update_seconds", report.update_seconds},
        {"measuring_seconds", report.spent_seconds}};
    for (const Candidate& candidate : report.candidates) document["candidates"].push_back(to_json(report, candidate));
    print(stdout, "{}\n", document.dump(2));
}

// The steps of a run under one plan.
struct Steps {
    std::int64_t count = 0;
    std::int64_t out_of_memory = 0;
    std::int64_t peak_bytes = 0;
    std::optional<std::int64_t> predicted_peak_bytes;
    std::vector<double> seconds, predicted_for;  // of all steps; of those with a predicted time
    std::optional<double> predicted_seconds;

    void add(const StepRecord& step) {
        ++count;
        out_of_memory += step.out_of_memory;
        peak_bytes = std::max(peak_bytes, step.peak_bytes);
        // The memory beyond the plan varies between steps; the peak is at the largest.
        if (step.predicted_peak_bytes) {
            predicted_peak_bytes = std::max(predicted_peak_bytes.value_or(0), *step.predicted_peak_bytes);
        }
        if (!predicted_seconds) predicted_seconds = step.predicted_step_seconds;
        seconds.push_back(step.step_seconds);
        if (step.predicted_step_seconds) predicted_for.push_back(step.step_seconds);
    }

    double median_seconds() const { return median(predicted_for.empty() ? seconds : predicted_for); }
};

using StepsByPlan = std::map<std::pair<std::int64_t, bool>, Steps>;  // by micro-batch and recompute

StepsByPlan read_run(const std::string& folder) {
    const LoggedRun run = read_run_log(folder);
    if (run.cut) {
        throw Error(ErrorKind::bad_data,
                    fmt::format("--run {}: metrics.jsonl ends in the middle of line {}", folder, run.steps.size() + 1));
    }
    StepsByPlan by_plan;
    for (const StepRecord& step : run.steps) by_plan[{step.micro_batch, step.recompute}].add(step);
    return by_plan;
}

void print_run(const StepsByPlan& run) {
    std::vector<std::vector<std::string>> rows{{"steps", "micro-batch", "recompute", "predicted peak", "measured peak",
                                                "", "predicted time", "measured time", "", "out of memory"}};
    for (const auto& [plan, steps] : run) {
        const double seconds = steps.median_seconds();
        const auto& peak = steps.predicted_peak_bytes;
        const auto& time = steps.predicted_seconds;
        rows.push_back({format_count(steps.count), std::to_string(plan.first), plan.second ? "yes" : "no",
                        bytes_or_dash(peak), format_bytes(steps.peak_bytes),
                        peak ? percent_off(static_cast<double>(*peak), static_cast<double>(steps.peak_bytes)) : "",
                        time ? fmt::format("{:.3f} s", *time) : "-", fmt::format("{:.3f} s", seconds),
                        time ? percent_off(*time, seconds) : "", std::to_string(steps.out_of_memory)});
    }
    print_table(stdout, rows);
}

void print_json(const StepsByPlan& run) {
    nlohmann::ordered_json document = nlohmann::ordered_json::array();
    for (const auto& [plan, steps] : run) {
        document.push_back({{"steps", steps.count},
                            {"micro_batch", plan.first},
                            {"recompute", plan.second},
                            {"predicted_peak_bytes", json_value(steps.predicted_peak_bytes)},
                            {"measured_peak_bytes", steps.peak_bytes},
                            {"predicted_step_seconds", json_value(steps.predicted_seconds)},
                            {"measured_step_seconds", steps.median_seconds()},
                            {"out_of_memory", steps.out_of_memory}});
    }
    print(stdout, "{}\n", document.dump(2));
}

// What was predicted for a run against what it measured: peak memory and time per step, for each plan that it used.
int check_run(const std::string& folder, bool json) {
    const StepsByPlan run = read_run(folder);
    json ? print_json(run) : print_run(run);
    return 0;
}

int plan_or_check(const Arguments& arguments) {
    const Settings& settings = arguments.settings;
    if (!settings.run.empty()) return check_run(settings.run, settings.json);
    validate(settings);
    const std::int64_t budget = memory_budget_of(settings);
    use_threads(settings);
    install_budget_allocator();
    const JobPlan plan = open_job(settings, {2, Unit::steps});
    watch_interrupts();
    const Job job = make_job_to_plan(plan, budget);
    const PlanReport report = plan_job(plan, job, budget, settings.json ? stderr : stdout, /*whole_table=*/true);
    settings.json ? print_json(plan, report) : print_report(plan, report);
    report.choice();  // if nothing fits, the error says what would help
    return 0;
}

}  // namespace

CommandSpec plan_command() {
    return {.command = command::plan,
            .name = "plan",
            .summary = "Show how a batch can be split to fit in a memory budget",
            .footer = R"(Examples:
  microbatch plan --data /usr/share/games/fortunes --model gpt-tiny --batch 256 --memory 100MiB
  microbatch plan --run runs/gpt-tiny-20261124-120000
Measures a few micro-batch sizes on the job itself, predicts the others, and marks the one that `train` would use.
Exit code 3 if nothing fits; the message says how much memory the smallest plan needs, for what, and what would help.)",
            .run = plan_or_check};
}

}  // namespace microbatch::cli
