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
#include "cli/interrupt.h"
#include "cli/job.h"
#include "cli/output.h"
#include "cli/plan_job.h"
#include "cli/progress.h"
#include "microbatch/analysis/verify.h"
#include "microbatch/core/error.h"
#include "microbatch/io/json_number.h"
#include "microbatch/io/run_log.h"
#include "microbatch/io/safetensors.h"
#include "microbatch/memory/budget_allocator.h"

namespace microbatch::cli {
namespace {

// A step is refused before it does harm, but steps that are all refused train nothing; without the guard, too.
constexpr int most_refused_in_a_row = 10;

struct Outcome {
    TrainerReport last;
    double first_loss = 0.0;
    std::optional<double> held_out;  // not measured when interrupted
    double seconds = 0.0;
    std::vector<double> step_seconds;
    std::int64_t peak_bytes = 0;
    std::int64_t out_of_memory = 0;
    std::int64_t refused = 0;
    int refused_in_a_row = 0;  // up to the last step; batches of weight 0 do not count
    bool interrupted = false;
    bool ended_in_nan = false;  // the length was reached, by steps that were refused because they are not finite

    bool diverged() const { return last.diverged || ended_in_nan || refused_in_a_row >= most_refused_in_a_row; }

    // Counts the last step in.
    void add(std::int64_t peak) {
        peak_bytes = std::max(peak_bytes, peak);
        step_seconds.push_back(last.seconds);
        out_of_memory += last.step.out_of_memory;
        if (last.progress.steps == 1) first_loss = last.step.loss;
        if (!last.step.applied) ++refused;
        const bool bad = !last.step.applied && last.step.weight > 0.0;
        refused_in_a_row = bad ? refused_in_a_row + 1 : 0;
    }
};

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

void print_rate_rule(std::FILE* out, const Settings& settings) {
    const RateRule rule = rate_rule_of(settings);
    if (rule == RateRule::none) return;
    fmt::print(out, "rule      {}\n",
               describe_scaling(constants_of(settings), constants_of(settings, settings.batch), rule,
                                *settings.reference_batch, settings.batch));
}

void print_header(std::FILE* out, const JobPlan& plan, const PlanReport& report, Interval length,
                  const std::filesystem::path& folder) {
    const Candidate& chosen = report.choice();
    fmt::print(out, "model     {}\n", plan.model_description);
    fmt::print(out, "data      {}\n", plan.data.description);
    fmt::print(out, "batch     {} samples per step, {} ({})\n", plan.settings.batch, describe_cut(chosen), report.why);
    fmt::print(out, "memory    budget {}, predicted peak {}: {}\n", format_bytes(report.budget_bytes),
               format_bytes(chosen.peak_bytes()), describe_parts(parts_of(report, chosen)));
    fmt::print(out, "optimizer {}, learning rate {:g}, schedule {}, {}, clip {:g}\n", plan.settings.optimizer,
               constants_of(plan.settings, plan.settings.batch).learning_rate, plan.settings.schedule,
               to_string(length), plan.settings.clip);
    print_rate_rule(out, plan.settings);
    fmt::print(out, "run       {}, seed {}, {} threads\n", folder.string(), plan.settings.seed, at::get_num_threads());
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
StepMeasures measures_of(const TrainerReport& report, std::int64_t peak, std::int64_t batch, const Candidate& chosen) {
    StepMeasures measures{.peak_bytes = peak};
    if (report.step.plan != chosen.plan) return measures;
    measures.predicted_peak_bytes = chosen.peak_bytes();
    if (report.samples == batch) measures.predicted_step_seconds = chosen.step_seconds;
    return measures;
}

void note_out_of_memory(ProgressLine& progress, const TrainerReport& report) {
    if (report.step.out_of_memory == 0) return;
    progress.note(fmt::format("step {}: out of memory; undone and made again in micro-batches of {}{}",
                              report.progress.steps, report.step.plan.micro_batch,
                              report.step.plan.recompute ? " with recompute" : ""));
}

void note_refusal(ProgressLine& progress, const TrainerReport& report) {
    if (report.step.applied || report.step.weight == 0.0) return;
    progress.note(fmt::format("step {}: refused: {}", report.progress.steps, report.step.reason));
}

void measure_held_out(const JobPlan& plan, const Job& job, const Candidate& chosen, Outcome& outcome) {
    const std::int64_t micro_batch =
        outcome.out_of_memory > 0 ? outcome.last.step.plan.micro_batch : chosen.plan.micro_batch;
    try {
        outcome.held_out = held_out_loss(plan, job, outcome.last.progress.samples, micro_batch);
    } catch (const Interrupted&) {
        outcome.interrupted = true;
    }
}

// Trains until the run is done, interrupted, refused too often, or out of memory whatever the micro-batch: what came of
// it is in `outcome` in any case.
void train_to_the_end(std::FILE* out, const JobPlan& plan, const Job& job, const PlanReport& report, Interval length,
                      const BudgetDrill& drill, RunLog& log, Outcome& outcome) {
    Trainer trainer(
        *job.accumulator, *plan.data.train, job.loss,
        {.batch = plan.settings.batch,
         .length = length,
         .schedule = schedule_of(plan.settings, length, plan.data.train->tokens_per_sample(), plan.settings.batch),
         .seed = static_cast<std::uint64_t>(plan.settings.seed),
         .guard = plan.settings.no_guard
                      ? std::nullopt
                      : std::optional(SpikeGuardOptions{.most_refused = most_refused_in_a_row - 1})});
    ProgressLine progress(out, length, speed_unit(plan), report.budget_bytes);
    const Candidate& chosen = report.choice();
    const auto started = std::chrono::steady_clock::now();
    while (!trainer.done() && !interrupted() && !outcome.diverged()) {
        reset_peak_memory();
        outcome.last = trainer.step();
        outcome.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
        const std::int64_t peak = memory_use().peak_bytes;
        outcome.add(peak);
        log.write(outcome.last, measures_of(outcome.last, peak, plan.batch, chosen));
        note_out_of_memory(progress, outcome.last);
        note_refusal(progress, outcome.last);
        progress.update(outcome.last, peak);
        drill.after(outcome.last);
    }
    progress.finish();
    const StepReport& last = outcome.last.step;
    outcome.ended_in_nan = trainer.done() && outcome.refused_in_a_row > 0 &&
                           !(std::isfinite(last.loss) && std::isfinite(last.gradient_norm));
    outcome.interrupted = !trainer.done() && !outcome.diverged();
    if (trainer.done() && log.lines() > 0 && !outcome.diverged()) measure_held_out(plan, job, chosen, outcome);
}

// A run that never made a step leaves nothing, so that the same command can be given again.
void remove_unused_folder(const std::filesystem::path& folder) {
    std::error_code ignored;
    std::filesystem::remove(folder / "config.toml", ignored);
    std::filesystem::remove(folder / "metrics.jsonl", ignored);
    std::filesystem::remove(folder, ignored);  // only if nothing else is in it
}

void report_divergence(const Outcome& outcome, const Settings& settings) {
    if (!outcome.diverged()) return;
    const std::string before = outcome.refused_in_a_row > 1 ? fmt::format(", and the {} steps before were refused, too",
                                                                          outcome.refused_in_a_row - 1)
                                                            : std::string();
    throw Error(ErrorKind::stopped,
                fmt::format("the run diverged at step {}: {}{}. What is written are the weights of the last step that "
                            "was applied; take a smaller --lr than {:g}, a --warmup or a smaller --clip",
                            outcome.last.progress.steps, outcome.last.step.reason, before, learning_rate_of(settings)));
}

void save_weights(const std::filesystem::path& folder, const Job& job) {
    Parameters tensors = job.parameters;
    for (const auto& buffer : job.model->named_buffers()) tensors.push_back({buffer.key(), buffer.value()});
    write_safetensors(folder / "model.safetensors", tensors);
}

double speed(const Outcome& outcome) {
    return static_cast<double>(outcome.last.progress.tokens) / std::max(outcome.seconds, 1e-9);
}

void print_summary(std::FILE* out, const JobPlan& plan, const PlanReport& report, const Outcome& outcome,
                   const std::filesystem::path& folder) {
    const Progress& progress = outcome.last.progress;
    const Candidate& chosen = report.choice();
    fmt::print(out, "{}{} steps, {} samples in {}: {} {}/s\n",
               outcome.interrupted || outcome.diverged() ? "stopped   " : "done      ", format_count(progress.steps),
               format_count(progress.samples), clock_time(outcome.seconds), format_count(std::llround(speed(outcome))),
               speed_unit(plan));
    fmt::print(out, "loss      {:.4f} at the first step, {:.4f} at the last", outcome.first_loss,
               outcome.last.step.loss);
    fmt::print(out, "{}\n", outcome.held_out ? fmt::format(", {:.4f} held out", *outcome.held_out) : std::string());
    fmt::print(out, "memory    peak {} measured, {} predicted ({}), budget {}\n", format_bytes(outcome.peak_bytes),
               format_bytes(chosen.peak_bytes()),
               percent_off(static_cast<double>(chosen.peak_bytes()), static_cast<double>(outcome.peak_bytes)),
               format_bytes(report.budget_bytes));
    const double seconds = median(outcome.step_seconds);
    fmt::print(out, "time      {:.3f} s a step measured, {:.3f} s predicted ({})\n", seconds, chosen.step_seconds,
               percent_off(chosen.step_seconds, seconds));
    if (outcome.out_of_memory > 0) {
        fmt::print(
            out,
            "undone    {} times a step ran out of memory and was made again, in the end in micro-batches of {}{}\n",
            outcome.out_of_memory, outcome.last.step.plan.micro_batch,
            outcome.last.step.plan.recompute ? " with recompute" : "");
    }
    if (outcome.refused > 0) {
        fmt::print(out, "refused   {} steps were not applied; the reasons are in metrics.jsonl\n", outcome.refused);
    }
    fmt::print(out, "written   {}: config.toml, metrics.jsonl, model.safetensors\n", folder.string());
}

void print_json(const JobPlan& plan, const PlanReport& report, const Outcome& outcome,
                const std::filesystem::path& folder) {
    const Candidate& chosen = report.choice();
    nlohmann::ordered_json document;
    document["model"] = plan.model;
    document["data"] = plan.settings.data;
    document["batch"] = plan.settings.batch;
    document["peak_learning_rate"] = constants_of(plan.settings, plan.settings.batch).learning_rate;
    document["lr_rule"] = to_string(rate_rule_of(plan.settings));
    document["micro_batch"] = outcome.last.step.plan.micro_batch;
    document["recompute"] = outcome.last.step.plan.recompute;
    document["steps"] = outcome.last.progress.steps;
    document["samples"] = outcome.last.progress.samples;
    document["tokens"] = outcome.last.progress.tokens;
    document["first_loss"] = json_number(outcome.first_loss);
    document["loss"] = json_number(outcome.last.step.loss);
    document["held_out_loss"] = outcome.held_out ? json_number(*outcome.held_out) : nullptr;
    document["seconds"] = outcome.seconds;
    document["tokens_per_second"] = speed(outcome);
    document["peak_bytes"] = outcome.peak_bytes;
    document["predicted_peak_bytes"] = chosen.peak_bytes();
    document["step_seconds"] = median(outcome.step_seconds);
    document["predicted_step_seconds"] = chosen.step_seconds;
    document["budget_bytes"] = report.budget_bytes;
    document["out_of_memory"] = outcome.out_of_memory;
    document["refused_steps"] = outcome.refused;
    document["interrupted"] = outcome.interrupted;
    document["run"] = folder.string();
    fmt::print("{}\n", document.dump(2));
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
    write_config(folder, plan, report.choice().plan, length, budget);
    print_header(out, plan, report, length, folder);
    if (!settings.no_verify) check_decomposition(out, plan, job);
    Outcome outcome;
    try {
        train_to_the_end(out, plan, job, report, length, drill, log, outcome);
    } catch (...) {
        // Whatever ended the run, its last step was undone: the weights are those of the step before.
        log.lines() == 0 ? remove_unused_folder(folder) : save_weights(folder, job);
        throw;
    }
    if (log.lines() == 0) {
        remove_unused_folder(folder);
        return interrupted_exit_code;
    }
    save_weights(folder, job);
    print_summary(out, plan, report, outcome, folder);
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
    command
        ->add_flag(
            "--no-guard", settings->no_guard,
            "Refuse only what is not finite; not losses and gradient norms far beyond those of the last 128 steps, "
            "nor a run whose loss climbs")
        ->group("Run");
    command->footer(
        "Examples:\n"
        "  microbatch train --data /usr/share/games/fortunes --batch 64 --memory 64MiB --steps 200\n"
        "  microbatch train --data /usr/share/datasets/fashion-mnist --model resnet --norm group --batch 512 \\\n"
        "      --memory 100MiB --samples 60k --optimizer sgd --warmup \"5 steps\"\n"
        "Written to the run's folder: config.toml, metrics.jsonl (one object a step), model.safetensors.\n"
        "The held-out loss is of as many samples as the run trained on, 1,024 at most.\n"
        "A run that diverges is stopped with exit code 4.\n"
        "Ctrl-C finishes the step, writes the weights and ends with exit code 130.");
    command->callback([command, settings, &action] {
        action = [command, settings] {
            refuse_empty_values(*command);
            apply_config(*command, *settings);
            return train(*settings);
        };
    });
}

}  // namespace microbatch::cli
