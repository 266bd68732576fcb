#include "cli/commands/train_loop.h"

#include <fmt/format.h>

#include <chrono>
#include <cmath>
#include <cstdlib>
#include <sstream>
#include <string>
#include <vector>

#include "cli/commands/interrupt.h"
#include "cli/print/progress.h"
#include "cli/print/train_output.h"
#include "microbatch/core/error.h"
#include "microbatch/core/units.h"
#include "microbatch/memory/budget_allocator.h"

namespace microbatch::cli {
namespace {

// A prediction is logged with the steps that it is of: the plan's own, and for the time of a full batch.
StepMeasures measures_of(const TrainerReport& report, std::int64_t peak, std::int64_t copy_bytes, const JobPlan& plan,
                         const PlanReport& planned) {
    StepMeasures measures{.peak_bytes = peak};
    if (report.step.plan != planned.choice().plan) return measures;
    measures.predicted_peak_bytes = predicted_peak(planned, planned.choice(),
                                                   {.copy_bytes = report.snapshot_bytes + copy_bytes,
                                                    .noise = report.step.noise.has_value(),
                                                    .first_step = report.progress.steps == 1});
    if (report.samples == plan.batch) measures.predicted_step_seconds = planned.choice().step_seconds;
    return measures;
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

/// Says what seldom happens, once.
class Notes {
public:
    Notes(ProgressLine& progress, const Watch& watch) : progress_(progress), watch_(watch) {}

    void of_step(const Outcome& outcome) {
        note_out_of_memory(progress_, outcome.last);
        note_refusal(progress_, outcome.last);
        if (watch_.recovery) note_going_back(progress_, outcome.last, *watch_.recovery, outcome.restores);
        if (!outcome.last.warning.empty()) progress_.note(outcome.last.warning);
    }

    void of_pause(const TrainerReport& report) {
        if (!report.warning.empty()) progress_.note(report.warning);
    }

    void of_files(RunFiles& files, const std::string& log_failure, const std::string& event_failure) {
        say_once(log_, log_failure, "; the run goes on, and the lines are written when they can be");
        say_once(events_, event_failure,
                 "; the run goes on without what TensorBoard would draw, until it can be written");
        of_checkpoints(files);
    }

    void of_checkpoints(RunFiles& files) {
        for (const std::string& warning : files.checkpoints.warnings()) {
            if (warning == checkpoint_warning_) continue;  // that the log is gone, each time
            checkpoint_warning_ = warning;
            progress_.note(fmt::format("warning: {}; the run goes on, and those before it are as they were", warning));
        }
    }

private:
    void say_once(bool& failing, const std::string& failure, const char* what_then) {
        if (!failure.empty() && !failing) progress_.note("warning: " + failure + what_then);
        failing = !failure.empty();
    }

    ProgressLine& progress_;
    const Watch& watch_;
    bool log_ = false, events_ = false;
    std::string checkpoint_warning_;  // the last one
};

TrainerOptions options_of(const TrainRun& run, RunFiles& files) {
    const JobPlan& plan = run.plan;
    return {
        .batch = plan.settings.batch,
        .batches = plan.batches,
        .rate_rule = plan.batches.size() > 1 ? rate_rule_of(plan.settings) : RateRule::none,
        .length = run.length,
        .schedule = schedule_of(plan.settings, run.length, plan.data.train->tokens_per_sample(), plan.settings.batch),
        .seed = static_cast<std::uint64_t>(plan.settings.seed),
        .guard = run.watch.guard,
        .recovery = run.watch.recovery,
        .noise_every = run.watch.noise_every,
        .pause = [] { return interrupted(); },
        .release_memory = [&files] { return files.checkpoints.release(); }};
}

void go_on(const TrainRun& run, Trainer& trainer, RunFiles& files, Outcome& outcome) {
    const Plan plan = outcome.plan;
    trainer.restore(run.resume->checkpoint.trainer);
    files.checkpoints.go_on_from(run.resume->checkpoint.trainer, run.resume->damaged);
    files.events.go_on(trainer.progress().steps);
    outcome = run.resume->notes.outcome;
    outcome.plan = plan;
    outcome.last.progress = trainer.progress();
    outcome.resumed_from = trainer.progress().steps;
    // Its files are open as long as its tensors can be asked for.
    run.resume->checkpoint.trainer = {};
}

void save_where_due(const Trainer& trainer, RunFiles& files, Outcome& outcome) {
    const auto started = std::chrono::steady_clock::now();
    if (!files.checkpoints.after_step(trainer, outcome)) return;
    const std::chrono::duration<double> waited = std::chrono::steady_clock::now() - started;
    outcome.checkpoint_seconds += waited.count();
}

// One step, and all that is to be written of it. False if it was left in the midst of its batch.
bool train_step(const TrainRun& run, Trainer& trainer, RunFiles& files, ProgressLine& progress, Notes& notes,
                Outcome& outcome) {
    reset_peak_memory();
    const std::int64_t copy_bytes = files.checkpoints.memory_bytes();
    const TrainerReport report = trainer.step();
    if (report.paused) {
        notes.of_pause(report);
        return false;
    }
    outcome.last = report;
    const std::int64_t peak = memory_use().peak_bytes;
    const StepMeasures measures = measures_of(report, peak, copy_bytes, run.plan, run.report);
    outcome.add(peak, measures.predicted_peak_bytes, run.plan.batch);
    const std::string log_failure = files.log.write(report, measures);
    const std::string event_failure = files.events.write(report.progress.steps, scalars_of(report, measures));
    notes.of_step(outcome);
    progress.update(report, peak);
    if (!outcome.diverged()) save_where_due(trainer, files, outcome);
    notes.of_files(files, log_failure, event_failure);
    run.drill.after(report);
    return true;
}

void measure_held_out(const TrainRun& run, Outcome& outcome) {
    try {
        outcome.held_out = held_out_loss(run.plan, run.job, outcome.last.progress.samples, outcome.plan.micro_batch);
    } catch (const Interrupted&) {
        outcome.interrupted = true;
    }
}

}  // namespace

BudgetDrill::BudgetDrill() {
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

void BudgetDrill::after(const TrainerReport& report) const {
    if (report.progress.steps == step_) set_memory_budget(bytes_);
}

void train_to_the_end(const TrainRun& run, RunFiles& files, Outcome& outcome) {
    Trainer trainer(*run.job.accumulator, *run.plan.data.train, run.job.loss, options_of(run, files));
    if (run.resume != nullptr) {
        go_on(run, trainer, files, outcome);
    } else if (run.plan.settings.resume) {
        files.events.go_on(0);  // what a process before drew of a beginning that is made anew
    }
    ProgressLine progress(run.out, run.length, speed_unit(run.plan), run.report.budget_bytes, trainer.progress());
    Notes notes(progress, run.watch);
    const double seconds_before = outcome.seconds;
    const auto started = std::chrono::steady_clock::now();
    bool left_open = false;
    try {
        while (!trainer.done() && !interrupted() && !outcome.diverged() && !left_open) {
            left_open = !train_step(run, trainer, files, progress, notes, outcome);
            const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - started;
            outcome.seconds = seconds_before + elapsed.count();
        }
    } catch (...) {
        progress.finish();
        // Whatever it was, the trainer is as before the step.
        if (trainer.progress().steps > 0) files.checkpoints.save_now(trainer, outcome);
        notes.of_checkpoints(files);
        throw;
    }
    progress.finish();
    const StepReport& last = outcome.last.step;
    outcome.ended_in_nan = trainer.done() && outcome.refused_in_a_row > 0 &&
                           !(std::isfinite(last.loss) && std::isfinite(last.gradient_norm));
    outcome.interrupted = !trainer.done() && !outcome.diverged();
    if (!outcome.diverged() && (trainer.progress().steps > 0 || left_open)) {
        outcome.checkpointed = files.checkpoints.save_now(trainer, outcome);
    }
    files.checkpoints.release();
    notes.of_checkpoints(files);
    outcome.checkpoints = files.checkpoints.written();
    // The weights that are written next are those of the last step, not of the midst of a batch.
    if (run.job.accumulator->is_paused()) run.job.accumulator->discard({});
    if (trainer.done() && files.log.lines() > 0 && !outcome.diverged()) measure_held_out(run, outcome);
}

}  // namespace microbatch::cli
