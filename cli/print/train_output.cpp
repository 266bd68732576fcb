#include "cli/print/train_output.h"

#include <ATen/Parallel.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "cli/commands/job.h"
#include "cli/print/output.h"
#include "microbatch/core/error.h"
#include "microbatch/core/spike_guard.h"
#include "microbatch/core/units.h"
#include "microbatch/io/json.h"
#include "microbatch/run/run_log.h"

namespace microbatch::cli {
namespace {

void print_batch_schedule(std::FILE* out, const JobPlan& plan) {
    if (plan.batches.size() > 1) print(out, "batches   {}\n", to_string(plan.batches));
}

void print_rate_rule(std::FILE* out, const Settings& settings) {
    const RateRule rule = rate_rule_of(settings);
    if (!settings.reference_batch) {
        if (!settings.batch_schedule.empty())
            print(out, "rule      the learning rate is scaled with the batch by the rule {}\n", to_string(rule));
        return;
    }
    if (rule == RateRule::none) return;
    print(out, "rule      {}\n",
          describe_scaling(constants_of(settings), constants_of(settings, settings.batch), rule,
                           *settings.reference_batch, settings.batch));
}

double speed(const Outcome& outcome) {
    return static_cast<double>(outcome.last.progress.tokens) / std::max(outcome.seconds, 1e-9);
}

std::string describe_divergence(const Outcome& outcome, const Settings& settings) {
    const std::string before = outcome.refused_in_a_row > 1 ? fmt::format("; the {} steps before it were refused too",
                                                                          outcome.refused_in_a_row - 1)
                                                            : std::string();
    const std::string restored = outcome.restores > 1
                                     ? fmt::format("; it had already rolled back {} times", outcome.restores - 1)
                                     : std::string();
    const std::string weights =
        !outcome.weights_written
            ? "model.safetensors still holds the weights of the previous run"
            : fmt::format("model.safetensors holds the weights of {}",
                          outcome.last.rolled_back_to ? fmt::format("step {}", *outcome.last.rolled_back_to)
                                                      : "the last applied step");
    const std::string cure =
        outcome.healthy_checkpoint
            ? fmt::format("resume from the healthy checkpoint of step {} (--resume) with", *outcome.healthy_checkpoint)
            : "use";
    return fmt::format(
        "the run diverged at step {}: {}{}{}. {}; {} a lower --lr than {:g}, a --warmup or a smaller --clip",
        outcome.last.progress.steps, outcome.last.step.reason, before, restored, weights, cure,
        learning_rate_of(settings));
}

std::string describe_bad_end(const Outcome& outcome, const Settings& settings) {
    const std::string held_out = outcome.held_out ? fmt::format(", {:.4g} held out", *outcome.held_out) : std::string();
    return fmt::format(
        "the run ended worse than it began: the loss was {:.4g} at the first step and {:.4g} at the last{}; use a "
        "lower "
        "--lr than {:g}, a --warmup or a smaller --clip",
        outcome.first_loss, outcome.last.step.loss, held_out, learning_rate_of(settings));
}

}  // namespace

void print_header(std::FILE* out, const JobPlan& plan, const PlanReport& report, const Watch& watch, Interval length,
                  const std::filesystem::path& folder) {
    const Candidate& chosen = report.choice();
    print(out, "model     {}\n", plan.model_description);
    print_data(out, plan.data, 10);
    const std::string batch = plan.batches.size() == 1 ? fmt::format("{} samples per step", plan.settings.batch)
                                                       : fmt::format("{} samples per step at first, {} at most",
                                                                     plan.settings.batch, plan.batch);
    const int processes = plan.reducer->size();
    print(out, "batch     {}, {}{} ({})\n", batch, describe_cut(chosen),
          processes == 1 ? "" : fmt::format(", in each of {} processes", processes), report.why);
    if (plan.reducer->divides()) {
        print(out, "sharded   each process keeps its share of the optimizer's state, {} here\n",
              format_bytes(report.fixed.optimizer_state));
    }
    if (!report.batch_norm.empty()) print(out, "norm      BatchNorm {}\n", report.batch_norm);
    if (const auto layers = replaced_norms(plan)) print(out, "norm      {}\n", *layers);
    print(out, "memory    budget {}, predicted peak {}: {}\n", format_bytes(report.budget_bytes),
          format_bytes(chosen.peak_bytes()), describe_parts(parts_of(report, chosen)));
    print(out, "optimizer {}, learning rate {:g}, schedule {}, {}, clip {:g}\n", plan.settings.optimizer,
          constants_of(plan.settings, plan.settings.batch).learning_rate, plan.settings.schedule, to_string(length),
          plan.settings.clip);
    print_batch_schedule(out, plan);
    print_rate_rule(out, plan.settings);
    print(out, "guard     {}\n", watch.guard_line);
    print(out, "noise     {}\n", watch.noise_line);
    print(out, "saved     {}\n", watch.saved_line);
    const std::string& device = plan.settings.device;
    print(out, "run       {}, seed {}, {} threads{}\n", folder.string(), plan.settings.seed, at::get_num_threads(),
          device == "cpu" ? "" : ", on " + device);
}

void note_step(ProgressLine& progress, const TrainerReport& report, const std::optional<RecoveryOptions>& recovery) {
    const StepReport& step = report.step;
    const auto note = [&](const std::string& what) {
        progress.note(fmt::format("step {}: {}", report.progress.steps, what));
    };
    if (step.out_of_memory > 0) {
        note(fmt::format("out of memory; undone and repeated in micro-batches of {}{}", step.plan.micro_batch,
                         step.plan.recompute ? " with recompute" : ""));
    }
    if (!step.applied && step.weight != 0.0) note("refused: " + step.reason);
    if (report.rolled_back_to && recovery) {
        note(fmt::format(
            "diverged; rolled back to the weights of step {}; the learning rate warms up over {} steps to at most {:g} "
            "times the last calm one; the data since then is skipped",
            *report.rolled_back_to, recovery->warmup, recovery->rate_factor));
    }
    if (!report.warning.empty()) progress.note(report.warning);
}

void print_summary(std::FILE* out, const JobPlan& plan, const PlanReport& report, const Watch& watch,
                   const Outcome& outcome, const std::filesystem::path& folder) {
    const Progress& progress = outcome.last.progress;
    const Candidate& chosen = report.choice();
    const std::int64_t predicted = std::max(outcome.predicted_peak_bytes, chosen.peak_bytes());
    print(out, "{}{} steps, {} samples in {}: {} {}/s\n",
          outcome.interrupted || outcome.diverged() ? "stopped   " : "done      ", format_count(progress.steps),
          format_count(progress.samples), format_seconds(outcome.seconds), format_count(std::llround(speed(outcome))),
          speed_unit(plan));
    print(out, "loss      {:.4f} at the first step, {:.4f} at the last", outcome.first_loss, outcome.last.step.loss);
    print(out, "{}\n", outcome.held_out ? fmt::format(", {:.4f} held out", *outcome.held_out) : std::string());
    if (outcome.overfits) {
        print(out, "          warning: the held-out loss is above the first training losses: the model overfits\n");
    }
    print(out, "memory    peak {} measured, {} predicted ({}), budget {}\n", format_bytes(outcome.peak_bytes),
          format_bytes(predicted), percent_off(static_cast<double>(predicted), static_cast<double>(outcome.peak_bytes)),
          format_bytes(report.budget_bytes));
    if (watch.options.trainer.noise_every > 0) {
        print(out, "noise     {}\n",
              outcome.last.noise_batch ? fmt::format("as large as the gradient at a batch of {} (a proxy)",
                                                     format_count(std::llround(*outcome.last.noise_batch)))
                                       : "undefined: too few measurements, or the noise hides the gradient");
    }
    const double seconds = outcome.median_step_seconds();
    if (seconds > 0.0) {  // a run that was already complete makes no step
        print(out, "time      {:.3f} s per step measured, {:.3f} s predicted ({})\n", seconds, chosen.step_seconds,
              percent_off(chosen.step_seconds, seconds));
    }
    if (outcome.out_of_memory > 0) {
        print(out, "retried   {} times after running out of memory, the last time in micro-batches of {}{}\n",
              outcome.out_of_memory, outcome.plan.micro_batch, outcome.plan.recompute ? " with recompute" : "");
    }
    if (outcome.restores > 0) {
        print(out, "restores  the run diverged and rolled back to earlier weights {} times, at a lower rate\n",
              outcome.restores);
    }
    if (outcome.refused > 0) {
        print(out, "refused   {} steps were not applied; metrics.jsonl has the reasons\n", outcome.refused);
    }
    if (outcome.checkpoint_seconds > 0.0) {
        print(out, "saved     {} times; training waited {:.3f} s for checkpoints\n", outcome.checkpoints,
              outcome.checkpoint_seconds);
    }
    print(out, "written   {}: config.toml, metrics.jsonl, {}report.html, summary.json{}\n", folder.string(),
          outcome.weights_written ? "model.safetensors, " : "", outcome.checkpointed ? ", checkpoints" : "");
    if (outcome.interrupted) print_way_on(out, outcome, folder);
}

void print_way_on(std::FILE* out, const Outcome& outcome, const std::filesystem::path& folder) {
    if (!outcome.checkpointed) return;
    print(out, "continue  microbatch train --run {} --resume\n", folder.string());
}

void print_json(const JobPlan& plan, const PlanReport& report, const Outcome& outcome,
                const std::filesystem::path& folder) {
    const Candidate& chosen = report.choice();
    const bool stepped = outcome.last.progress.steps > 0;
    const bool left_nothing = !std::filesystem::exists(folder);  // as a run that came to nothing does
    const nlohmann::ordered_json document{
        {"model", plan.model},
        {"data", plan.settings.data},
        {"batch", plan.settings.batch},
        {"device", plan.settings.device},
        {"peak_learning_rate", constants_of(plan.settings, plan.settings.batch).learning_rate},
        {"lr_rule", to_string(rate_rule_of(plan.settings))},
        {"micro_batch", outcome.plan.micro_batch},
        {"recompute", outcome.plan.recompute},
        {"batch_norm", report.batch_norm.empty() ? nullptr : json_value(to_string(outcome.plan.batch_norm))},
        {"steps", outcome.last.progress.steps},
        {"samples", outcome.last.progress.samples},
        {"tokens", outcome.last.progress.tokens},
        {"first_loss", stepped ? json_value(outcome.first_loss) : nullptr},
        {"loss", stepped ? json_value(outcome.last.step.loss) : nullptr},
        {"held_out_loss", json_value(outcome.held_out)},
        {"seconds", outcome.seconds},
        {"tokens_per_second", speed(outcome)},
        {"peak_bytes", outcome.peak_bytes},
        {"predicted_peak_bytes", std::max(outcome.predicted_peak_bytes, chosen.peak_bytes())},
        {"step_seconds", outcome.median_step_seconds()},
        {"predicted_step_seconds", chosen.step_seconds},
        {"budget_bytes", report.budget_bytes},
        {"out_of_memory", outcome.out_of_memory},
        {"refused_steps", outcome.refused},
        {"restores", outcome.restores},
        {"noise_batch", json_value(outcome.last.noise_batch)},
        {"checkpoints", outcome.checkpoints},
        {"checkpoint_seconds", outcome.checkpoint_seconds},
        {"interrupted", outcome.interrupted},
        {"resumed_from", json_value(outcome.resumed_from)},
        {"run", left_nothing ? nullptr : json_value(folder.string())}};
    print(stdout, "{}\n", document.dump(2));
}

void report_divergence(const Outcome& outcome, const Settings& settings) {
    if (outcome.diverged()) throw Error(ErrorKind::stopped, describe_divergence(outcome, settings));
    if (outcome.ended_worse) throw Error(ErrorKind::stopped, describe_bad_end(outcome, settings));
}

std::string banner_of(const Outcome& outcome, const Settings& settings) {
    if (outcome.diverged()) return "Stopped by the guard: " + describe_divergence(outcome, settings) + ".";
    if (outcome.ended_worse) return "Failed: " + describe_bad_end(outcome, settings) + ".";
    if (outcome.interrupted) return "Interrupted before its end.";
    return {};
}

}  // namespace microbatch::cli
