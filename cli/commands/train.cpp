#include <fmt/format.h>

#include <cstdlib>
#include <ctime>
#include <filesystem>
#include <numeric>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "cli/commands/commands.h"
#include "cli/commands/job.h"
#include "cli/commands/launch.h"
#include "cli/commands/process.h"
#include "cli/commands/ranks.h"
#include "cli/commands/resume.h"
#include "cli/commands/sharding.h"
#include "cli/commands/watch.h"
#include "cli/options/config.h"
#include "cli/options/refuse.h"
#include "cli/print/output.h"
#include "cli/print/train_output.h"
#include "microbatch/analysis/verify.h"
#include "microbatch/core/error.h"
#include "microbatch/core/units.h"
#include "microbatch/memory/budget_allocator.h"
#include "microbatch/memory/meter.h"
#include "microbatch/memory/reclaim.h"
#include "microbatch/run/follower.h"
#include "microbatch/run/run.h"

namespace microbatch::cli {
namespace {

// Without --run: runs/MODEL-DATE-TIME, with a number appended if that exists.
std::filesystem::path new_folder(const std::string& model) {
    const std::time_t now = std::time(nullptr);
    std::tm local{};
    char time[32];
    std::strftime(time, sizeof(time), "%Y%m%d-%H%M%S", localtime_r(&now, &local));
    const std::string name = fmt::format("runs/{}-{}", model, time);
    std::filesystem::path folder = name;
    for (int i = 2; std::filesystem::exists(folder); ++i) folder = fmt::format("{}-{}", name, i);
    return folder;
}

/// MICROBATCH_BUDGET_DRILL="5 20MiB": after step 5 the budget is 20 MiB, to simulate running out of memory.
struct BudgetDrill {
    std::int64_t step = 0, bytes = 0;

    /// Errors: ErrorKind::usage if the variable cannot be parsed.
    static BudgetDrill from_environment() {
        const char* drill = std::getenv("MICROBATCH_BUDGET_DRILL");
        if (drill == nullptr) return {};
        std::istringstream words(drill);
        BudgetDrill result;
        std::string size;
        if (!(words >> result.step >> size) || result.step < 1) {
            refuse("MICROBATCH_BUDGET_DRILL is \"{}\"; it must be a step and a size, such as \"5 20MiB\"", drill);
        }
        result.bytes = parse_bytes(size);
        return result;
    }
};

// Empty if there are too few samples or they do not fit.
std::optional<Verification> verify_two(const JobPlan& plan, const Job& job, std::int64_t micro_batch) {
    if (plan.data.train->size() < 2 * micro_batch) return std::nullopt;
    std::vector<std::int64_t> samples(static_cast<std::size_t>(2 * micro_batch));
    std::iota(samples.begin(), samples.end(), 0);
    return unless_oom([&] {
        return verify(*job.model, plan.data.train->get(samples), job.loss, micro_batch,
                      job.accumulator->plan().batch_norm);
    });
}

// On the fewest samples that can be split: more would only delay the run.
std::pair<std::optional<Verification>, std::int64_t> verify_samples(const JobPlan& plan, const Job& job) {
    try {
        return {verify_two(plan, job, 1), 1};
    } catch (const TooFewSamples&) {
        return {verify_two(plan, job, 2), 2};
    }
}

void check_decomposition(std::FILE* out, const JobPlan& plan, const Job& job) {
    const auto [verified, micro_batch] = verify_samples(plan, job);
    if (!verified) {
        print(out,
              "verify    skipped: a micro-batch of {} samples and two more copies of the gradients do not fit in "
              "memory\n",
              2 * micro_batch);
        return;
    }
    if (verified->ok()) {
        print(out, "verify    {} samples as a whole and as {} + {}: same gradients\n", 2 * micro_batch, micro_batch,
              micro_batch);
        return;
    }
    print(out, "verify    warning: the gradient depends on how the batch is split");
    if (!verified->differences.empty()) {
        print(out, ": {} parameters differ, {} most (by {:.2g})", verified->differences.size(),
              verified->differences.front().parameter, verified->differences.front().relative);
    }
    print(out, "\n");
    for (const Cause cause : verified->causes) print(out, "          {}\n", describe(cause));
}

/// A run that is about to start.
struct Planned {
    std::FILE* out;
    const JobPlan& plan;
    const Job& job;
    const PlanReport& report;
    const Watch& watch;
    Interval length;
    BudgetDrill drill;

    Settings recorded() const {
        return resolved(plan.settings, job.accumulator->plan(), length, plan.data.train->tokens_per_sample(),
                        report.budget_bytes);
    }

    Schedule schedule() const { return schedule_of(plan.settings, length, plan.data.train->tokens_per_sample()); }

    RunOptions options(const RunNotes& notes, RunObserver& observer) const {
        const Settings& settings = plan.settings;
        RunOptions options = watch.options;
        TrainerOptions& trainer = options.trainer;
        trainer.batch = settings.batch;
        trainer.batches = plan.batches;
        trainer.rate_rule = plan.batches.size() > 1 ? rate_rule_of(settings) : RateRule::none;
        trainer.length = length;
        trainer.schedule = schedule();
        trainer.seed = settings.seed;
        trainer.stop = [] { return interrupted(); };
        options.config = notes.config;
        options.notes = notes.save();
        options.observer = &observer;
        return options;
    }
};

/// Shows a run on the terminal.
class Show final : public RunObserver {
public:
    Show(const Planned& planned, const Progress& begun)
        : planned_(planned),
          progress_(planned.out, planned.length, speed_unit(planned.plan), planned.report.budget_bytes, begun) {}

    void on_step(const Outcome& outcome) override {
        const TrainerReport& last = outcome.last;
        note_step(progress_, last, planned_.watch.options.trainer.recovery);
        progress_.update(last, outcome.peak_bytes);
        if (planned_.drill.step == last.progress.steps)
            meter_of(device_of(planned_.plan.settings)).set_budget(planned_.drill.bytes);
    }

    void on_note(const std::string& text) override { progress_.note(text); }

    void finish() { progress_.finish(); }

private:
    const Planned& planned_;
    ProgressLine progress_;
};

RunNotes notes_of(const JobPlan& plan, const Settings& recorded) {
    RunNotes notes = RunNotes::of_machine();
    notes.config = config_text(recorded);
    notes.data = plan.data.fingerprint;
    notes.files = plan.data.files;
    return notes;
}

// A changed length or rate makes the learning rate jump at this step.
void print_rate_change(std::FILE* out, const Trainer& trainer, double before) {
    if (trainer.done()) return;
    const double after = trainer.next_learning_rate();
    if (after != before) print(out, "          the learning rate goes from {:.4g} to {:.4g}\n", before, after);
}

void print_resume(std::FILE* out, const RunFolder& folder, const std::vector<std::string>& changes, Interval length) {
    if (!folder.resumes()) return;
    if (!folder.state()) {
        print(out, "resume    no checkpoint in {} yet: starting from the beginning\n", folder.path().string());
        return;
    }
    const CheckpointManifest at = manifest_of(*folder.state());
    print(out, "resume    from step {}{}{}{}\n", format_count(at.progress.steps),
          at.open_samples > 0 ? fmt::format(" and {} samples of the next step", format_count(at.open_samples)) : "",
          folder.passed_over()
              ? fmt::format(", the newest healthy checkpoint: at that of step {}, the run was diverging",
                            format_count(*folder.passed_over()))
              : "",
          at.progress.in(length.unit) < length.count ? "" : ", the last one: to train further, give a greater length");
    for (const std::string& change : changes) print(out, "          {}\n", change);
}

void measure_held_out(const Planned& planned, Outcome& outcome) {
    try {
        outcome.held_out =
            held_out_loss(planned.plan, planned.job, outcome.last.progress.samples, outcome.plan.micro_batch);
    } catch (const Interrupted&) {
        outcome.interrupted = true;
    }
}

// Prints and writes the results, whatever ended the training; returns the exit code.
int conclude(const Planned& planned, const Run& run, const Outcome& outcome, const std::filesystem::path& folder) {
    const Settings& settings = planned.plan.settings;
    if (outcome.last.progress.steps == 0) {
        if (!outcome.checkpointed) {
            if (!outcome.resumed_from) run.remove_unused();
        } else if (!settings.quiet) {
            print_way_on(planned.out, outcome, folder);
        }
        if (settings.json) print_json(planned.plan, planned.report, outcome, folder);
        return interrupted_exit_code;
    }
    write_report_of(folder, {.banner = banner_of(outcome, settings), .held_out_loss = outcome.held_out});
    if (!settings.quiet) print_summary(planned.out, planned.plan, planned.report, planned.watch, outcome, folder);
    if (settings.json) print_json(planned.plan, planned.report, outcome, folder);
    report_divergence(outcome, settings);
    return outcome.interrupted ? interrupted_exit_code : 0;
}

int train_in(RunFolder& folder, const Planned& planned) {
    const Settings& settings = planned.plan.settings;
    const RunNotes notes = notes_of(planned.plan, planned.recorded());
    Changes changes;
    double rate_before = 0.0;
    if (folder.state()) {
        rate_before = StateReader(*folder.state()).section("run").number("learning_rate");
        changes =
            reconcile(*folder.state(), notes, settings, planned.plan.data.train->size(), *planned.job.accumulator);
    }
    const Progress begun = folder.state() ? manifest_of(*folder.state()).progress : Progress{};
    if (!settings.quiet) {
        print_header(planned.out, planned.plan, planned.report, planned.watch, planned.length, folder.path());
    }
    print_resume(planned.out, folder, changes.lines, planned.length);
    if (!settings.no_verify && !folder.state()) check_decomposition(planned.out, planned.plan, planned.job);
    Show show(planned, begun);
    Run run(folder, *planned.job.accumulator, *planned.plan.data.train, planned.job.loss, planned.options(notes, show));
    if (changes.beyond_cut) print_rate_change(planned.out, run.trainer(), rate_before);
    if (run.missing_lines() > 0) {
        print(planned.out, "          metrics.jsonl lacks {} of these steps\n", run.missing_lines());
    }
    try {
        run.train();
    } catch (...) {
        show.finish();
        if (run.outcome().last.progress.steps == 0 && !run.outcome().resumed_from) run.remove_unused();
        throw;
    }
    show.finish();
    Outcome& outcome = run.outcome();
    if (run.trainer().done() && outcome.last.progress.steps > 0 && !outcome.diverged()) {
        measure_held_out(planned, outcome);
    }
    if (!outcome.interrupted && !outcome.diverged()) judge_end(outcome, folder.path());
    const int code = conclude(planned, run, outcome, folder.path());
    if (const std::string failure = run.flush(); !failure.empty()) {
        throw Error(ErrorKind::not_written, failure + "; its last lines are lost");
    }
    return code;
}

// What another rank than the first does: nothing is printed or written.
int follow_in(RunFolder& folder, const Planned& planned) {
    std::optional<StateDict>& state = folder.state();
    if (state) {
        reconcile(*state, notes_of(planned.plan, planned.recorded()), planned.plan.settings,
                  planned.plan.data.train->size(), *planned.job.accumulator);
    }
    class Silent final : public RunObserver {
    } silent;
    const RunOptions options = planned.options({}, silent);
    follow(*planned.job.accumulator, *planned.plan.data.train, planned.job.loss, options.trainer, state);
    return interrupted() ? interrupted_exit_code : 0;
}

// The first rank has the terminal, the folder and its lock.
std::FILE* output_of(const Ranks& ranks, Settings& settings) {
    if (ranks.is_first()) return settings.json ? stderr : stdout;
    settings.json = false;
    settings.quiet = true;
    static std::FILE* const nowhere = std::fopen("/dev/null", "we");
    return nowhere;
}

// A folder with a name of its own is known to the first rank alone.
std::filesystem::path folder_for(const Ranks& ranks, const std::optional<RunFolder>& folder, const std::string& model) {
    return ranks.from_first(folder ? folder->path().string() : new_folder(model).string());
}

int train_job(Arguments& arguments) {
    Settings& settings = arguments.settings;
    settings.resume = settings.resume || settings.resume_changed;
    watch_interrupts();
    if (is_launcher(settings)) return launch(settings);
    install_budget_allocator();
    if (settings.resume && settings.run.empty()) refuse("--resume needs --run: the folder of the run to resume");
    const Ranks ranks(settings);
    const RunAccess access = ranks.is_first() ? RunAccess::trains : RunAccess::follows;
    std::optional<RunFolder> folder;
    if (ranks.is_first() && !settings.run.empty()) folder.emplace(settings.run, settings.resume, access);
    ranks.from_first({});  // the others look at the folder when the first one has its lock
    if (!ranks.is_first() && !settings.run.empty()) folder.emplace(settings.run, settings.resume, access);
    if (ranks.size() > 1 && folder && folder->state()) drop_partial_batch(*folder->state());
    std::FILE* out = output_of(ranks, settings);
    if (folder && folder->state()) {
        fill_from_checkpoint(arguments, *folder);
        for (const std::string& warning : folder->warnings()) print(out, "warning: {}\n", warning);
    } else if (settings.resume && settings.data.empty()) {
        refuse("--run {} --resume: there is no checkpoint to resume from, and no --data to start with", settings.run);
    }
    resolve_batch(settings, arguments.flags.contains("batch"));
    validate(settings);
    checkpoint_options_of(settings);
    const Interval length = length_of(settings, default_length);
    const std::int64_t budget = memory_budget_of(settings);
    use_threads(settings);
    const BudgetDrill drill = BudgetDrill::from_environment();
    JobPlan plan = open_job(settings, length);
    plan.reducer = ranks.reducer();
    if (settings.quiet) {
        for (const std::string& warning : plan.data.warnings) print(out, "warning: {}\n", warning);
    }
    schedule_of(settings, length, plan.data.train->tokens_per_sample());
    // Before anything is measured.
    if (folder && folder->state()) {
        const Settings recorded =
            resolved(plan.settings, {.micro_batch = 1}, length, plan.data.train->tokens_per_sample(), budget);
        require_same_run(*folder->state(), notes_of(plan, recorded), settings);
    }
    ranks.require_same(
        config_text(resolved(plan.settings, {.micro_batch = 1}, length, plan.data.train->tokens_per_sample(), budget)),
        plan.data.fingerprint, folder && folder->state() ? manifest_of(*folder->state()).progress.steps : 0);
    const Job job = make_job_to_plan(plan, budget);
    const PlanReport report = plan_over_ranks(plan, job, budget, out, ranks);
    Plan cut = report.choice().plan;
    const std::filesystem::path path = folder_for(ranks, folder, plan.model);
    Watch watch = watch_of(plan, report, path);
    // A checkpoint has the state of all.
    if (job.accumulator->is_sharded()) watch.options.state_bytes += (ranks.size() - 1) * report.fixed.optimizer_state;
    ranks.agree(cut, watch.options.trainer.noise_every);
    job.accumulator->set_plan(cut);
    meter_of(device_of(settings)).set_budget(budget);
    if (!folder) folder.emplace(path, /*resume=*/false, access);
    const Planned planned{out, plan, job, report, watch, length, drill};
    if (!ranks.is_first()) return follow_in(*folder, planned);
    folder->lock();
    if (!folder->is_locked()) {
        print(out, "warning: {} is on a file system without locks: make sure that no other process trains in it\n",
              folder->path().string());
    }
    return train_in(*folder, planned);
}

}  // namespace

CommandSpec train_command() {
    return {.command = command::train,
            .name = "train",
            .summary = "Train a model with the batch size you want, within a memory budget",
            .footer = R"(Examples:
  microbatch train --data /usr/share/games/fortunes --batch 64 --memory 64MiB --steps 200
  microbatch train --data /usr/share/datasets/fashion-mnist --model resnet --norm group --batch 512 \
      --memory 100MiB --samples 60k --optimizer sgd --warmup "5 steps"
  microbatch train --run runs/gpt-tiny-20261124-120000 --resume
Files in the run's folder: config.toml, metrics.jsonl (one object per step), model.safetensors, report.html
(charts), summary.json (additional data for the charts), events.out.tfevents.* (for TensorBoard) and
checkpoints/step-N (safetensors and JSON).
The held-out loss is measured on as many samples as the run trained on, at most 1,024.
A run that diverges rolls back to a snapshot and continues at half the learning rate. After --restores
roll-backs, it is stopped with exit code 4. A run that ends worse than it began also ends with exit code 4.
Ctrl-C finishes the micro-batch, or with --processes the step, writes a checkpoint and ends with exit code 130; a second
Ctrl-C ends it immediately.
You may pass --resume on the first launch too: the same command line then starts the run and resumes it
after every interruption. --resume never overwrites weights that have no checkpoint.)",
            .length = to_string(default_length),
            .run = train_job};
}

}  // namespace microbatch::cli
