#include <ATen/Parallel.h>
#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "cli/commands.h"
#include "cli/config.h"
#include "cli/interrupt.h"
#include "cli/job.h"
#include "cli/output.h"
#include "microbatch/core/batch_plan.h"
#include "microbatch/core/units.h"
#include "microbatch/memory/budget_allocator.h"
#include "microbatch/memory/probe.h"

namespace microbatch::cli {
namespace {

void print_candidates(const JobPlan& plan, const Probe& probe, std::int64_t budget) {
    fmt::print("model   {}\n", plan.model_description);
    fmt::print("data    {}\n", plan.data.description);
    fmt::print("batch   {} samples per step, memory budget {}\n\n", plan.settings.batch, format_bytes(budget));
    std::vector<std::vector<std::string>> rows{
        {"", "micro-batch", "micro-batches", "predicted peak", "measured peak", "time per step", "fits"}};
    for (std::size_t i = 0; i < probe.candidates.size(); ++i) {
        const Candidate& candidate = probe.candidates[i];
        const auto& measured = candidate.measured;
        rows.push_back({i == probe.chosen ? "chosen" : "", std::to_string(candidate.micro_batch),
                        std::to_string(candidate.micro_batches), format_bytes(candidate.predicted_peak_bytes),
                        measured ? format_bytes(measured->peak_bytes) : "-",
                        measured ? fmt::format("{:.3f} s", candidate.step_seconds) : "-",
                        candidate.fits ? "yes" : "no"});
    }
    print_table(stdout, rows);
    if (probe.memory.fixed_bytes > 0.0)
        fmt::print("\npeak memory = {} + {} x micro-batch, within {:.1f} % of what was measured\n",
                   format_bytes(static_cast<std::int64_t>(probe.memory.fixed_bytes)),
                   format_bytes(static_cast<std::int64_t>(probe.memory.bytes_per_sample)),
                   100.0 * probe.memory.worst_relative_error);
    const Candidate& chosen = probe.candidates[probe.chosen];
    if (chosen.micro_batches == 1)
        fmt::print("accumulation is not needed: the whole batch fits and nothing is faster\n");
}

void print_json(const JobPlan& plan, const Probe& probe, std::int64_t budget) {
    nlohmann::ordered_json document;
    document["model"] = plan.model;
    document["batch"] = plan.settings.batch;
    document["budget_bytes"] = budget;
    document["micro_batch"] = probe.candidates[probe.chosen].micro_batch;
    document["micro_batches"] = probe.candidates[probe.chosen].micro_batches;
    document["fixed_bytes"] = probe.memory.fixed_bytes;
    document["bytes_per_sample"] = probe.memory.bytes_per_sample;
    for (const Candidate& candidate : probe.candidates) {
        nlohmann::ordered_json row;
        row["micro_batch"] = candidate.micro_batch;
        row["micro_batches"] = candidate.micro_batches;
        row["predicted_peak_bytes"] = candidate.predicted_peak_bytes;
        row["measured_peak_bytes"] = nullptr;
        row["step_seconds"] = nullptr;
        if (candidate.measured) {
            row["measured_peak_bytes"] = candidate.measured->peak_bytes;
            row["step_seconds"] = candidate.step_seconds;
        }
        row["fits"] = candidate.fits;
        document["candidates"].push_back(row);
    }
    fmt::print("{}\n", document.dump(2));
}

// The micro-batch that the user names is the only candidate.
Probe measure_given(const JobPlan& plan, std::int64_t budget) {
    const std::int64_t size = *micro_batch_of(plan.settings);
    const Measurement measured = measure_micro_batch(plan, size, budget);
    const std::int64_t count = micro_batch_count(plan.batch, size);
    const double share = static_cast<double>(plan.batch) / static_cast<double>(size);
    return {.candidates = {{.micro_batch = size,
                            .micro_batches = count,
                            .predicted_peak_bytes = measured.peak_bytes,
                            .measured = measured,
                            .step_seconds = share * measured.micro_batch_seconds + measured.update_seconds,
                            .fits = true}},
            .chosen = 0,
            .memory = {}};
}

int plan_batch(const Settings& settings) {
    validate(settings);
    const std::int64_t budget = memory_budget_of(settings);
    if (settings.threads > 0) at::set_num_threads(static_cast<int>(settings.threads));
    install_budget_allocator();
    const JobPlan plan = open_job(settings, {2, Unit::steps});
    watch_interrupts();
    require_room_for_samples(plan, budget);
    const Probe probe = micro_batch_of(settings) ? measure_given(plan, budget) : probe_job(plan, budget);
    if (settings.json) {
        print_json(plan, probe, budget);
    } else {
        print_candidates(plan, probe, budget);
    }
    return 0;
}

}  // namespace

void add_plan(CLI::App& application, Action& action) {
    CLI::App* command = application.add_subcommand("plan", "Show how a batch can be cut to fit a memory budget");
    auto settings = std::make_shared<Settings>();
    add_job_options(*command, *settings);
    command->footer(
        "Example:\n"
        "  microbatch plan --data /usr/share/games/fortunes --model gpt-tiny --batch 256 --memory 100MiB\n"
        "Measures a few micro-batch sizes on the job itself, predicts the others, and marks the one `train` would "
        "take.");
    command->callback([command, settings, &action] {
        action = [command, settings] {
            refuse_empty_values(*command);
            apply_config(*command, *settings);
            return plan_batch(*settings);
        };
    });
}

}  // namespace microbatch::cli
