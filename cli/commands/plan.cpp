#include <ATen/Parallel.h>
#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "cli/commands/commands.h"
#include "cli/commands/interrupt.h"
#include "cli/commands/plan_job.h"
#include "cli/commands/run_check.h"
#include "cli/options/config.h"
#include "cli/options/config_file.h"
#include "cli/options/flags.h"
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

void print_phases(const PhasePeaks& peaks) {
    const auto row = [](const char* phase, std::int64_t bytes) {
        if (bytes > 0) fmt::print("  {:<22} {}\n", phase, format_bytes(bytes));
    };
    fmt::print("\npredicted peak by phase\n");
    row("first micro-batch", peaks.first_micro_batch);
    row("later micro-batches", peaks.later_micro_batches);
    row("first optimizer step", peaks.first_update);
    row("later optimizer steps", peaks.later_updates);
}

void print_parts(const MemoryParts& parts) {
    fmt::print("\npredicted peak by part\n");
    fmt::print("  {:<22} {}\n", "parameters", format_bytes(parts.parameters));
    fmt::print("  {:<22} {}\n", "gradients", format_bytes(parts.gradients));
    fmt::print("  {:<22} {}\n", "optimizer state", format_bytes(parts.optimizer_state));
    fmt::print("  {:<22} {}\n", "activations", format_bytes(parts.activations));
    fmt::print("  {:<22} {}\n", "other (the batch, ...)", format_bytes(parts.other));
}

void print_report(const JobPlan& plan, const PlanReport& report) {
    fmt::print("model   {}\n", plan.model_description);
    fmt::print("data    {}\n", plan.data.description);
    fmt::print("batch   {} samples per step, memory budget {}\n\n", report.batch, format_bytes(report.budget_bytes));
    print_candidates(report);
    if (report.chosen) {
        const Candidate& chosen = report.choice();
        fmt::print("\nchosen  {}: {}\n", describe_cut(chosen), report.why);
        print_phases(chosen.measured ? *chosen.measured : *chosen.predicted);
        print_parts(parts_of(report, chosen));
    }
    fmt::print("\npredictions were within {:.1f} % of the peaks then measured{}; measuring took {:.1f} s\n",
               100.0 * report.worst_relative_error,
               report.affine ? "" : ": the model allocates in another way from one size to the next",
               report.spent_seconds);
}

nlohmann::ordered_json to_json(const MemoryParts& parts) {
    return {{"parameters", parts.parameters},
            {"gradients", parts.gradients},
            {"optimizer_state", parts.optimizer_state},
            {"activations", parts.activations},
            {"other", parts.other}};
}

nlohmann::ordered_json to_json(const std::optional<PhasePeaks>& peaks) {
    if (!peaks) return nullptr;
    return {{"first_micro_batch", peaks->first_micro_batch},
            {"later_micro_batches", peaks->later_micro_batches},
            {"first_update", peaks->first_update},
            {"later_updates", peaks->later_updates}};
}

nlohmann::ordered_json to_json(const PlanReport& report, const Candidate& candidate) {
    nlohmann::ordered_json row;
    row["micro_batch"] = candidate.plan.micro_batch;
    row["micro_batches"] = candidate.micro_batches;
    row["recompute"] = candidate.plan.recompute;
    row["predicted_peak_bytes"] = nullptr;
    row["measured_peak_bytes"] = nullptr;
    if (candidate.predicted) row["predicted_peak_bytes"] = candidate.predicted->largest();
    if (candidate.measured) row["measured_peak_bytes"] = candidate.measured->largest();
    row["phases"] = to_json(candidate.measured ? candidate.measured : candidate.predicted);
    row["parts"] = nullptr;
    if (candidate.predicted || candidate.measured) row["parts"] = to_json(parts_of(report, candidate));
    row["step_seconds"] = nullptr;
    if (candidate.step_seconds > 0.0) row["step_seconds"] = candidate.step_seconds;
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
    document["micro_batch"] = nullptr;
    document["micro_batches"] = nullptr;
    document["recompute"] = nullptr;
    if (report.chosen) {
        const Candidate& chosen = report.choice();
        document["micro_batch"] = chosen.plan.micro_batch;
        document["micro_batches"] = chosen.micro_batches;
        document["recompute"] = chosen.plan.recompute;
    }
    document["why"] = report.why;
    document["affine"] = report.affine;
    document["worst_relative_error"] = report.worst_relative_error;
    document["update_seconds"] = report.update_seconds;
    document["measuring_seconds"] = report.spent_seconds;
    for (const Candidate& candidate : report.candidates) document["candidates"].push_back(to_json(report, candidate));
    fmt::print("{}\n", document.dump(2));
}

int plan_batch_of(const Settings& settings) {
    validate(settings);
    const std::int64_t budget = memory_budget_of(settings);
    if (settings.threads > 0) at::set_num_threads(static_cast<int>(settings.threads));
    install_budget_allocator();
    const JobPlan plan = open_job(settings, {2, Unit::steps});
    watch_interrupts();
    const Job job = make_job_to_plan(plan, budget);
    const PlanReport report = plan_job(plan, job, budget, settings.json ? stderr : stdout, /*whole_table=*/true);
    settings.json ? print_json(plan, report) : print_report(plan, report);
    report.choice();  // where nothing fits this says so, and what would help
    return 0;
}

}  // namespace

void add_plan(CLI::App& application, Action& action) {
    CLI::App* command = application.add_subcommand("plan", "Show how a batch can be cut to fit a memory budget");
    auto settings = std::make_shared<Settings>();
    add_job_options(*command, *settings);
    command
        ->add_option("--run", settings->run,
                     "Folder of a run: show what was predicted for it against what it measured, and plan nothing")
        ->type_name("DIR")
        ->group("Run");
    command->footer(
        "Examples:\n"
        "  microbatch plan --data /usr/share/games/fortunes --model gpt-tiny --batch 256 --memory 100MiB\n"
        "  microbatch plan --run runs/gpt-tiny-20261124-120000\n"
        "Tries a few micro-batch sizes on the job itself, predicts the others, and marks the one `train` would take.\n"
        "Exit code 3 if nothing fits: then it says what the smallest plan needs, of what it is made, and what would\n"
        "help.");
    command->callback([command, settings, &action] {
        action = [command, settings] {
            refuse_empty_values(*command);
            apply_config_file(*command, settings->config);
            return settings->run.empty() ? plan_batch_of(*settings) : check_run(settings->run, settings->json);
        };
    });
}

}  // namespace microbatch::cli
