#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cli/commands/commands.h"
#include "cli/commands/interrupt.h"
#include "cli/commands/plan_job.h"
#include "cli/commands/run_check.h"
#include "cli/print/output.h"
#include "microbatch/core/units.h"
#include "microbatch/memory/budget_allocator.h"

namespace microbatch::cli {
namespace {

std::string bytes_or_dash(const std::optional<PhasePeaks>& peaks) {
    return peaks ? format_bytes(peaks->largest()) : "-";
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
                        bytes_or_dash(candidate.predicted), bytes_or_dash(candidate.measured),
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
    const auto bytes = [](const std::optional<PhasePeaks>& peaks) {
        return peaks ? nlohmann::ordered_json(peaks->largest()) : nullptr;
    };
    const std::optional<PhasePeaks>& peaks = candidate.measured ? candidate.measured : candidate.predicted;
    nlohmann::ordered_json row;
    row["micro_batch"] = candidate.plan.micro_batch;
    row["micro_batches"] = candidate.micro_batches;
    row["recompute"] = candidate.plan.recompute;
    row["predicted_peak_bytes"] = bytes(candidate.predicted);
    row["measured_peak_bytes"] = bytes(candidate.measured);
    row["phases"] = peaks ? to_json(phases_of(*peaks)) : nullptr;
    row["parts"] = peaks ? to_json(named(parts_of(report, candidate))) : nullptr;
    row["step_seconds"] = candidate.step_seconds > 0.0 ? nlohmann::ordered_json(candidate.step_seconds) : nullptr;
    row["time_measured"] = candidate.time_measured;
    row["fits"] = candidate.fits;
    return row;
}

void print_json(const JobPlan& plan, const PlanReport& report) {
    nlohmann::ordered_json document;
    document["model"] = plan.model;
    document["batch"] = report.batch;
    document["budget_bytes"] = report.budget_bytes;
    document["fits"] = report.chosen.has_value();
    const Candidate* chosen = report.chosen ? &report.choice() : nullptr;
    document["micro_batch"] = chosen ? nlohmann::ordered_json(chosen->plan.micro_batch) : nullptr;
    document["micro_batches"] = chosen ? nlohmann::ordered_json(chosen->micro_batches) : nullptr;
    document["recompute"] = chosen ? nlohmann::ordered_json(chosen->plan.recompute) : nullptr;
    document["why"] = report.why;
    document["affine"] = report.affine;
    document["worst_relative_error"] = report.worst_relative_error;
    document["update_seconds"] = report.update_seconds;
    document["measuring_seconds"] = report.spent_seconds;
    for (const Candidate& candidate : report.candidates) document["candidates"].push_back(to_json(report, candidate));
    print(stdout, "{}\n", document.dump(2));
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
