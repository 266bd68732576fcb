#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <torch/nn/module.h>

#include <c10/util/Exception.h>
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <ctime>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>
#include <vector>

#include "cli/commands.h"
#include "cli/config.h"
#include "cli/flags.h"
#include "cli/interrupt.h"
#include "cli/job.h"
#include "cli/outcome.h"
#include "cli/plan_job.h"
#include "cli/progress.h"
#include "cli/report.h"
#include "cli/train_output.h"
#include "cli/watch.h"
#include "microbatch/analysis/verify.h"
#include "microbatch/core/error.h"
#include "microbatch/io/event_file.h"
#include "microbatch/io/run_log.h"
#include "microbatch/io/safetensors.h"
#include "microbatch/memory/budget_allocator.h"

namespace microbatch::cli {
namespace {

// A folder of its own for a run that names none: runs/MODEL-DATE-TIME, with a number where that is taken.
std::filesystem::path run_folder(const Settings& settings, const std::string& model) {
    if (!settings.run.empty()) return settings.run;
    const std::time_t now = std::time(nullptr);
    std::tm local{};
    char time[32];
    std::strftime(time, sizeof(time), "%Y%m%d-%H%M%S", localtime_r(&now, &local));
    const std::string name = fmt::format("runs/{}-{}", model, time);
    std::filesystem::path folder = name;
    for (int i = 2; std::filesystem::exists(folder); ++i) folder = fmt::format("{}-{}", name, i);
    return folder;
}

// Nothing of the run may be overwritten, and that is to be known before anything is measured.
void refuse_used_folder(const std::filesystem::path& folder) {
    for (const char* name : {"config.toml", "metrics.jsonl", "model.safetensors"}) {
        if (std::filesystem::exists(std::filesystem::symlink_status(folder / name))) {
            throw Error(ErrorKind::usage, fmt::format("--run {}: {} exists already; name a new folder for this run",
                                                      folder.string(), name));
        }
    }
}

// The fewest samples that can be cut: more would delay the run, and tell no more of the models that there are.
std::optional<Verification> verify_samples(const JobPlan& plan, const Job& job) {
    const std::vector<std::int64_t> samples{0, 1};
    if (plan.data.train->size() < 2) return std::nullopt;
    try {
        return verify(*job.model, plan.data.train->get(samples), job.loss, 1);
    } catch (const c10::OutOfMemoryError&) {
        return std::nullopt;
    }
}

void check_decomposition(std::FILE* out, const JobPlan& plan, const Job& job) {
    const std::optional<Verification> verified = verify_samples(plan, job);
    if (!verified) {
        fmt::print(out, "verify    skipped: two samples at once and two more copies of the gradients do not fit\n");
        return;
    }
    const Verification& found = *verified;
    if (found.ok()) {
        fmt::print(out, "verify    2 samples whole and in 1 + 1: same gradients\n");
        return;
    }
    fmt::print(out, "verify    warning: the gradient depends on the cut");
    if (!found.differences.empty()) {
        fmt::print(out, " in {} parameters, most in {} (by {:.2g})", found.differences.size(),
                   found.differences.front().parameter, found.differences.front().relative);
    }
    fmt::print(out, "\n");
    for (const Cause cause : found.causes) fmt::print(out, "          {}\n", describe(cause));
}

// MICROBATCH_BUDGET_DRILL="5 20MiB": after step 5 the budget is 20 MiB, to rehearse what a run does then.
class BudgetDrill {
public:
    BudgetDrill() {
        const char* drill = std::getenv("MICROBATCH_BUDGET_DRILL");
        if (drill == nullptr) return;
        std::istringstream words(drill);
        std::string size;
        if (!(words >> step_ >> size) || step_ < 1) {
            throw Error(ErrorKind::usage,
                        fmt::format("MICROBATCH_BUDGET_DRILL is \"{}\"; give a step and a size, \"5 20MiB\"", drill));
        }
        bytes_ = parse_bytes(size);
    }

    void after(const TrainerReport& report) const {
        if (report.progress.steps == step_) set_memory_budget(bytes_);
    }

private:
    std::int64_t step_ = 0, bytes_ = 0;
};

// A prediction is logged with the steps that it is of: the plan's own, and for the time of a full batch.
StepMeasures measures_of(const TrainerReport& report, std::int64_t peak, const JobPlan& plan,
                         const PlanReport& planned) {
    StepMeasures measures{.peak_bytes = peak};
    if (report.step.plan != planned.choice().plan) return measures;
    measures.predicted_peak_bytes = predicted_peak(planned, planned.choice(),
                                                   {.snapshot_bytes = report.snapshot_bytes,
                                                    .noise = report.step.noise.has_value(),
                                                    .first_step = report.progress.steps == 1});
    if (report.samples == plan.batch) measures.predicted_step_seconds = planned.choice().step_seconds;
    return measures;
}

void measure_held_out(const JobPlan& plan, const Job& job, Outcome& outcome) {
    const std::int64_t micro_batch = outcome.plan.micro_batch;
    try {
        outcome.held_out = held_out_loss(plan, job, outcome.last.progress.samples, micro_batch);
    } catch (const Interrupted&) {
        outcome.interrupted = true;
    }
}

// What TensorBoard is to draw.
std::vector<Scalar> scalars_of(const TrainerReport& report, const StepMeasures& measures) {
    std::vector<Scalar> scalars{{"train/loss", report.step.loss},
                                {"train/gradient_norm", report.step.gradient_norm},
                                {"train/learning_rate", report.step.learning_rate},
                                {"train/batch", static_cast<double>(report.samples)},
                                {"train/applied", report.step.applied ? 1.0 : 0.0},
                                {"memory/peak_bytes", static_cast<double>(measures.peak_bytes)},
                                {"time/step_seconds", report.seconds}};
    if (measures.predicted_peak_bytes) {
        scalars.push_back({"memory/predicted_peak_bytes", static_cast<double>(*measures.predicted_peak_bytes)});
    }
    if (report.noise_batch) scalars.push_back({"noise/noise_batch", *report.noise_batch});
    return scalars;
}

void note_events(ProgressLine& progress, const Watch& watch, const Outcome& outcome) {
    note_out_of_memory(progress, outcome.last);
    note_refusal(progress, outcome.last);
    if (watch.recovery) note_going_back(progress, outcome.last, *watch.recovery, outcome.restores);
    if (!outcome.last.warning.empty()) progress.note(outcome.last.warning);
}

// Trains until the run is done, interrupted, diverged, or out of memory whatever the micro-batch: what came of it is in
// `outcome` in any case.
void train_to_the_end(std::FILE* out, const JobPlan& plan, const Job& job, const PlanReport& report, const Watch& watch,
                      Interval length, const BudgetDrill& drill, RunLog& log, EventFile& events, Outcome& outcome) {
    Trainer trainer(
        *job.accumulator, *plan.data.train, job.loss,
        {.batch = plan.settings.batch,
         .batches = plan.batches,
         .rate_rule = plan.batches.size() > 1 ? rate_rule_of(plan.settings) : RateRule::none,
         .length = length,
         .schedule = schedule_of(plan.settings, length, plan.data.train->tokens_per_sample(), plan.settings.batch),
         .seed = static_cast<std::uint64_t>(plan.settings.seed),
         .guard = watch.guard,
         .recovery = watch.recovery,
         .noise_every = watch.noise_every});
    ProgressLine progress(out, length, speed_unit(plan), report.budget_bytes);
    const auto started = std::chrono::steady_clock::now();
    while (!trainer.done() && !interrupted() && !outcome.diverged()) {
        reset_peak_memory();
        outcome.last = trainer.step();
        outcome.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
        const std::int64_t peak = memory_use().peak_bytes;
        const StepMeasures measures = measures_of(outcome.last, peak, plan, report);
        outcome.add(peak, measures.predicted_peak_bytes, plan.batch);
        log.write(outcome.last, measures);
        events.write(outcome.last.progress.steps, scalars_of(outcome.last, measures));
        note_events(progress, watch, outcome);
        progress.update(outcome.last, peak);
        drill.after(outcome.last);
    }
    progress.finish();
    const StepReport& last = outcome.last.step;
    outcome.ended_in_nan = trainer.done() && outcome.refused_in_a_row > 0 &&
                           !(std::isfinite(last.loss) && std::isfinite(last.gradient_norm));
    outcome.interrupted = !trainer.done() && !outcome.diverged();
    if (trainer.done() && log.lines() > 0 && !outcome.diverged()) {
        measure_held_out(plan, job, outcome);
    }
}

// A run that never made a step leaves nothing, so that the same command can be given again.
void remove_unused_folder(const std::filesystem::path& folder, const EventFile& events) {
    std::error_code ignored;
    std::filesystem::remove(events.path(), ignored);
    std::filesystem::remove(folder / "config.toml", ignored);
    std::filesystem::remove(folder / "metrics.jsonl", ignored);
    std::filesystem::remove(folder, ignored);  // only if nothing else is in it
}

void save_weights(const std::filesystem::path& folder, const Job& job) {
    write_safetensors(folder / "model.safetensors", weights_of(job));
}

int train(const Settings& settings) {
    validate(settings);
    const Interval length = length_of(settings, {100, Unit::steps});
    const std::int64_t budget = memory_budget_of(settings);
    std::FILE* out = settings.json ? stderr : stdout;
    if (settings.threads > 0) at::set_num_threads(static_cast<int>(settings.threads));
    const BudgetDrill drill;
    install_budget_allocator();
    watch_interrupts();
    if (!settings.run.empty()) refuse_used_folder(settings.run);
    const JobPlan plan = open_job(settings, length);
    schedule_of(settings, length, plan.data.train->tokens_per_sample(), settings.batch);
    const Job job = make_job_to_plan(plan, budget);
    const PlanReport report = plan_job(plan, job, budget, out);
    job.accumulator->set_plan(report.choice().plan);
    set_memory_budget(budget);
    const std::filesystem::path folder = run_folder(settings, plan.model);
    RunLog log(folder);
    EventFile events(folder);
    write_config(folder, config_of(plan, report.choice().plan, length, budget));
    const Watch watch = watch_of(plan, report, folder);
    if (!settings.quiet) print_header(out, plan, report, watch, length, folder);
    if (!settings.no_verify) check_decomposition(out, plan, job);
    Outcome outcome;
    outcome.plan = report.choice().plan;
    try {
        train_to_the_end(out, plan, job, report, watch, length, drill, log, events, outcome);
    } catch (...) {
        // Whatever ended the run, its last step was undone: the weights are those of the step before.
        log.lines() == 0 ? remove_unused_folder(folder, events) : save_weights(folder, job);
        throw;
    }
    if (log.lines() == 0) {
        remove_unused_folder(folder, events);
        return interrupted_exit_code;
    }
    save_weights(folder, job);
    write_run_report(folder, {.banner = banner_of(outcome, settings), .held_out_loss = outcome.held_out});
    if (!settings.quiet) print_summary(out, plan, report, watch, outcome, folder);
    if (settings.json) print_json(plan, report, outcome, folder);
    report_divergence(outcome, settings);
    return outcome.interrupted ? interrupted_exit_code : 0;
}

}  // namespace

void add_train(CLI::App& application, Action& action) {
    CLI::App* command = application.add_subcommand("train", "Train a model with the batch you want in a memory budget");
    auto settings = std::make_shared<Settings>();
    add_job_options(*command, *settings);
    add_length_options(*command, *settings, "100 steps");
    command
        ->add_option("--run", settings->run, "Folder of this run; it must not hold one yet (default runs/MODEL-TIME)")
        ->type_name("DIR")
        ->group("Run");
    command
        ->add_flag("--no-verify", settings->no_verify,
                   "Do not check at the start that the gradient is the same however the batch is cut")
        ->group("Run");
    add_train_options(*command, *settings);
    command
        ->add_flag("--quiet", settings->quiet, "Show the progress alone: neither the plan before nor the summary after")
        ->group("Run");
    command->footer(
        "Examples:\n"
        "  microbatch train --data /usr/share/games/fortunes --batch 64 --memory 64MiB --steps 200\n"
        "  microbatch train --data /usr/share/datasets/fashion-mnist --model resnet --norm group --batch 512 \\\n"
        "      --memory 100MiB --samples 60k --optimizer sgd --warmup \"5 steps\"\n"
        "Written to the run's folder: config.toml, metrics.jsonl (one object a step), model.safetensors, report.html\n"
        "(charts), summary.json (what the page tells beside the log), events.out.tfevents.* (for TensorBoard).\n"
        "The held-out loss is of as many samples as the run trained on, 1,024 at most.\n"
        "A run that diverges goes back to a snapshot, at half the rate; after --restores times it is stopped with "
        "exit\n"
        "code 4.\n"
        "Ctrl-C finishes the step, writes the weights and ends with exit code 130.");
    command->callback([command, settings, &action] {
        action = [command, settings] {
            refuse_empty_values(*command);
            const bool batch_given = command->get_option("--batch")->count() > 0;
            apply_config(*command, *settings);
            resolve_batch(*settings, batch_given);
            return train(*settings);
        };
    });
}

}  // namespace microbatch::cli
