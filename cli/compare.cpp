#include <ATen/Parallel.h>
#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>

#include "cli/commands.h"
#include "cli/config.h"
#include "cli/interrupt.h"
#include "cli/job.h"
#include "cli/machine.h"
#include "cli/output.h"
#include "cli/plan_job.h"
#include "cli/progress.h"
#include "microbatch/analysis/gradient_variance.h"
#include "microbatch/core/units.h"
#include "microbatch/io/json_number.h"
#include "microbatch/memory/budget_allocator.h"

namespace microbatch::cli {
namespace {

constexpr std::int64_t variance_batches = 8;

struct Strategy {
    const char* name;
    std::int64_t batch;
    Plan plan;
    // Below: measured.
    bool can_run = true;
    bool ran = false;
    std::int64_t peak_bytes = 0;
    double step_seconds = 0.0;    // median
    double sample_seconds = 0.0;  // total over all samples
    double held_out = 0.0;
    std::optional<double> variance = {};
};

void train_strategy(std::FILE* out, const JobPlan& plan, const Job& job, std::int64_t samples, std::int64_t budget,
                    Strategy& strategy) {
    const Interval length{samples, Unit::samples};
    Trainer trainer(
        *job.accumulator, *plan.data.train, job.loss,
        {.batch = strategy.batch,
         .length = length,
         .schedule = schedule_of(plan.settings, length, plan.data.train->tokens_per_sample(), strategy.batch),
         .seed = static_cast<std::uint64_t>(plan.settings.seed)});
    ProgressLine progress(out, length, speed_unit(plan), budget);
    std::vector<double> seconds;
    while (!trainer.done() && !interrupted()) {
        const TrainerReport report = trainer.step();
        seconds.push_back(report.seconds);
        if (report.step.out_of_memory > 0) strategy.plan = report.step.plan;  // what it was run by in the end
        progress.update(report, memory_use().peak_bytes);
    }
    progress.finish();
    if (!trainer.done()) return;
    double total = 0.0;
    for (const double step : seconds) total += step;
    strategy.ran = true;
    strategy.step_seconds = median(seconds);
    strategy.sample_seconds = total / static_cast<double>(trainer.progress().samples);
    strategy.peak_bytes = memory_use().peak_bytes;
    strategy.held_out = held_out_loss(plan, job, samples, std::min(strategy.plan.micro_batch, std::int64_t{64}));
}

void measure_variance(const JobPlan& plan, const Job& job, Strategy& strategy) {
    Sampler sampler(plan.data.train->size(), static_cast<std::uint64_t>(plan.settings.seed) + 1);
    strategy.variance = gradient_variance(
                            job.parameters, variance_batches,
                            [&] { return plan.data.train->get(sampler.next(strategy.batch)); }, strategy.plan, job.loss)
                            .variance;
}

void run_strategy(std::FILE* out, const JobPlan& plan, std::int64_t samples, std::int64_t budget, std::int64_t most,
                  Strategy& strategy, std::vector<Strategy>* with_variance) {
    fmt::print(out, "{}: batch {} in micro-batches of {}\n", strategy.name, strategy.batch, strategy.plan.micro_batch);
    const BudgetScope allowed(most);
    reset_peak_memory();
    const Job job = make_job(plan, strategy.plan, strategy.batch);
    train_strategy(out, plan, job, samples, budget, strategy);
    if (interrupted()) throw Interrupted();
    if (with_variance == nullptr) return;
    fmt::print(out, "gradient variance over {} batches of each strategy\n", variance_batches);
    const BudgetScope lifted(no_budget);
    for (Strategy& each : *with_variance) {
        if (each.can_run) measure_variance(plan, job, each);
    }
}

// The variance of every strategy is taken at the same parameters: those the accumulated run ended with.
void run_all(std::FILE* out, const JobPlan& plan, std::int64_t samples, std::int64_t budget,
             std::vector<Strategy>& strategies) {
    const std::int64_t machine = std::max(budget, available_memory_bytes() / 10 * 9);
    Strategy &small = strategies[0], &accumulated = strategies[1], &native = strategies[2];
    native.can_run = native.peak_bytes > 0 && native.peak_bytes <= machine;
    run_strategy(out, plan, samples, budget, budget, accumulated, &strategies);
    run_strategy(out, plan, samples, budget, budget, small, nullptr);
    if (native.can_run) run_strategy(out, plan, samples, budget, machine, native, nullptr);
}

void print_strategies(std::FILE* out, const JobPlan& plan, const std::vector<Strategy>& strategies,
                      std::int64_t samples, std::int64_t budget) {
    const RateRule rule = rate_rule_of(plan.settings);
    fmt::print(out, "\n{}; {} samples each, the same seed and schedule, {}; memory budget {}\n\n",
               plan.model_description, format_count(samples),
               rule == RateRule::none ? "the same rate"
                                      : fmt::format("the rate by the rule {} from batch {}", to_string(rule),
                                                    *plan.settings.reference_batch),
               format_bytes(budget));
    std::vector<std::vector<std::string>> rows{{"strategy", "batch", "micro-batch", "rate", "peak memory", "fits",
                                                "gradient variance", "time per step", "time per sample",
                                                "held-out loss"}};
    for (const Strategy& s : strategies) {
        auto measured = [&s](const std::string& figure) { return s.ran ? figure : std::string("-"); };
        rows.push_back({s.name, std::to_string(s.batch), std::to_string(s.plan.micro_batch),
                        fmt::format("{:.4g}", constants_of(plan.settings, s.batch).learning_rate),
                        format_bytes(s.peak_bytes) + (s.ran ? "" : " predicted"), s.peak_bytes <= budget ? "yes" : "no",
                        s.variance ? fmt::format("{:.3g}", *s.variance) : "-",
                        measured(fmt::format("{:.1f} ms", 1e3 * s.step_seconds)),
                        measured(fmt::format("{:.3f} ms", 1e3 * s.sample_seconds)),
                        measured(fmt::format("{:.4f}", s.held_out))});
    }
    print_table(out, rows);
    if (!strategies[2].ran) {
        fmt::print(out, "\nnative was not run: its predicted peak is more than this machine has free\n");
    }
}

void print_json(const JobPlan& plan, const std::vector<Strategy>& strategies, std::int64_t samples,
                std::int64_t budget) {
    nlohmann::ordered_json document;
    document["model"] = plan.model;
    document["data"] = plan.settings.data;
    document["samples"] = samples;
    document["budget_bytes"] = budget;
    for (const Strategy& s : strategies) {
        nlohmann::ordered_json row;
        row["strategy"] = s.name;
        row["batch"] = s.batch;
        row["peak_learning_rate"] = constants_of(plan.settings, s.batch).learning_rate;
        row["micro_batch"] = s.plan.micro_batch;
        row["recompute"] = s.plan.recompute;
        row["ran"] = s.ran;
        row["peak_bytes"] = s.peak_bytes;  // predicted, if it was not run
        row["fits"] = s.peak_bytes <= budget;
        row["gradient_variance"] = s.variance ? json_number(*s.variance) : nlohmann::ordered_json();
        row["step_seconds"] = s.ran ? json_number(s.step_seconds) : nlohmann::ordered_json();
        row["sample_seconds"] = s.ran ? json_number(s.sample_seconds) : nlohmann::ordered_json();
        row["held_out_loss"] = s.ran ? json_number(s.held_out) : nlohmann::ordered_json();
        document["strategies"].push_back(row);
    }
    fmt::print("{}\n", document.dump(2));
}

struct PlannedCuts {
    Plan cut;
    std::int64_t native_peak_bytes = 0;
};

// How the batch is accumulated, and what it would need at once: it can be more than the machine has, and is not tried.
PlannedCuts plan_cuts(std::FILE* out, const JobPlan& plan, std::int64_t budget) {
    const Job job = make_job_to_plan(plan, budget);
    PlannedCuts cuts{.cut = plan_job(plan, job, budget, out).choice().plan};
    const std::int64_t machine = std::max(budget, available_memory_bytes() / 10 * 9);
    const PlanReport native = plan_native(plan, job, machine);
    for (const Candidate& candidate : native.candidates) {
        if (candidate.micro_batches == 1) cuts.native_peak_bytes = candidate.peak_bytes();
    }
    if (cuts.cut.micro_batch == plan.batch && plan.batch > 1) {
        cuts.cut.micro_batch = std::max<std::int64_t>(1, plan.batch / 4);
        fmt::print(out, "the whole batch of {} is the plan; to compare, it is also accumulated by {}\n", plan.batch,
                   cuts.cut.micro_batch);
    }
    return cuts;
}

int compare(const Settings& settings) {
    validate(settings);
    const std::int64_t budget = memory_budget_of(settings);
    const Interval asked = length_of(settings, {16 * settings.batch, Unit::samples});
    std::FILE* out = settings.json ? stderr : stdout;
    if (settings.threads > 0) at::set_num_threads(static_cast<int>(settings.threads));
    install_budget_allocator();
    watch_interrupts();
    const JobPlan plan = open_job(settings, asked);
    const std::int64_t tokens_per_sample = plan.data.train->tokens_per_sample();
    const std::int64_t samples = convert(asked, Unit::samples, settings.batch, tokens_per_sample).count;
    schedule_of(settings, {samples, Unit::samples}, tokens_per_sample, settings.batch);
    const PlannedCuts cuts = plan_cuts(out, plan, budget);
    std::vector<Strategy> strategies{
        {.name = "small batch", .batch = cuts.cut.micro_batch, .plan = cuts.cut},
        {.name = "accumulated", .batch = settings.batch, .plan = cuts.cut},
        {.name = "native", .batch = settings.batch, .plan = {.micro_batch = settings.batch}}};
    strategies[2].peak_bytes = cuts.native_peak_bytes;
    run_all(out, plan, samples, budget, strategies);
    print_strategies(out, plan, strategies, samples, budget);
    if (settings.json) print_json(plan, strategies, samples, budget);
    return 0;
}

}  // namespace

void add_compare(CLI::App& application, Action& action) {
    CLI::App* command = application.add_subcommand(
        "compare", "Train with a small batch, the batch accumulated and the batch at once, and compare");
    auto settings = std::make_shared<Settings>();
    add_job_options(*command, *settings);
    add_length_options(*command, *settings, "16 batches");
    command->footer(
        "Example:\n"
        "  microbatch compare --data /usr/share/games/fortunes --batch 64 --memory 64MiB --samples 1280\n"
        "Every strategy sees the same samples (default 16 batches). What is beyond the budget is run all the same "
        "where\n"
        "the machine has the memory, and marked as not fitting. Gradient variance: trace of the covariance of the "
        "batch's\n"
        "mean gradient, all strategies at the same parameters.");
    command->callback([command, settings, &action] {
        action = [command, settings] {
            refuse_empty_values(*command);
            apply_config(*command, *settings);
            return compare(*settings);
        };
    });
}

}  // namespace microbatch::cli
