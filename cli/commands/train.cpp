#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <torch/nn/module.h>

#include <c10/util/Exception.h>
#include <ctime>
#include <filesystem>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cli/commands/commands.h"
#include "cli/commands/interrupt.h"
#include "cli/commands/job.h"
#include "cli/commands/outcome.h"
#include "cli/commands/plan_job.h"
#include "cli/commands/report.h"
#include "cli/commands/resume.h"
#include "cli/commands/train_loop.h"
#include "cli/commands/watch.h"
#include "cli/options/config.h"
#include "cli/options/config_file.h"
#include "cli/options/flags.h"
#include "cli/options/refuse.h"
#include "cli/print/output.h"
#include "cli/print/train_output.h"
#include "microbatch/analysis/verify.h"
#include "microbatch/core/error.h"
#include "microbatch/core/units.h"
#include "microbatch/io/run_lock.h"
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
            throw Error(
                ErrorKind::usage,
                fmt::format("--run {}: {} exists already; go on with it by --resume, or name a new folder for this "
                            "run",
                            folder.string(), name));
        }
    }
}

// Weights of a run that has ended would be written over.
void refuse_weights_without_checkpoint(const std::filesystem::path& folder) {
    if (!std::filesystem::exists(std::filesystem::symlink_status(folder / "model.safetensors"))) return;
    refuse(
        fmt::format("--run {} --resume: there is no checkpoint to go on from, and to begin anew would write over "
                    "model.safetensors; name a new folder for this run, or move that file away",
                    folder.string()));
}

// None where there are too few samples or they do not fit.
std::optional<Verification> verify_two(const JobPlan& plan, const Job& job, std::int64_t micro_batch) {
    std::vector<std::int64_t> samples(static_cast<std::size_t>(2 * micro_batch));
    std::iota(samples.begin(), samples.end(), 0);
    if (plan.data.train->size() < 2 * micro_batch) return std::nullopt;
    try {
        return verify(*job.model, plan.data.train->get(samples), job.loss, micro_batch);
    } catch (const c10::OutOfMemoryError&) {
        return std::nullopt;
    }
}

// On the fewest samples that can be cut: more would delay the run, and tell no more of the models that there are.
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
        fmt::print(out, "verify    skipped: {} samples at once and two more copies of the gradients do not fit\n",
                   2 * micro_batch);
        return;
    }
    const Verification& found = *verified;
    if (found.ok()) {
        fmt::print(out, "verify    {} samples whole and in {} + {}: same gradients\n", 2 * micro_batch, micro_batch,
                   micro_batch);
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

// What a process that was killed has left of snapshots that only it could read.
void remove_snapshots(const std::filesystem::path& folder) {
    std::error_code failure;
    std::vector<std::filesystem::path> left;
    std::filesystem::directory_iterator entry(folder, failure);
    for (; !failure && entry != std::filesystem::directory_iterator(); entry.increment(failure)) {
        const std::string name = entry->path().filename().string();
        if (name.starts_with("snapshot-") && name.ends_with(".bin")) left.push_back(entry->path());
    }
    for (const auto& path : left) std::filesystem::remove(path, failure);
}

RunNotes notes_of(const JobPlan& plan, const std::string& config) {
    RunNotes notes = notes_of_machine();
    notes.config = config;
    notes.data = plan.data.fingerprint;
    return notes;
}

void print_resume(std::FILE* out, const std::optional<ResumePoint>& resume, const std::vector<std::string>& changes,
                  const Settings& settings, Interval length) {
    if (!settings.resume) return;
    if (!resume) {
        fmt::print(out, "resume    there is no checkpoint in {} yet: from the beginning\n", settings.run);
        return;
    }
    const auto& open = resume->checkpoint.trainer.open;
    const Progress& progress = resume->checkpoint.trainer.progress;
    fmt::print(out, "resume    from step {}{}{}\n", format_count(progress.steps),
               open ? fmt::format(" and {} samples of the next", format_count(open->samples)) : std::string(),
               progress.in(length.unit) < length.count ? "" : ", its last: to go on, give it a greater length");
    for (const std::string& change : changes) fmt::print(out, "          {}\n", change);
}

// What is printed and written once training has ended, however that was; the exit code.
int conclude(const TrainRun& run, const RunFiles& files, const Outcome& outcome, const std::filesystem::path& folder) {
    const Settings& settings = run.plan.settings;
    if (outcome.last.progress.steps == 0) {
        if (!outcome.checkpointed) {
            if (run.resume == nullptr) remove_unused_folder(folder, files.events);
        } else if (!settings.quiet) {
            print_way_on(run.out, outcome, folder);
        }
        if (settings.json) print_json(run.plan, run.report, outcome, folder);
        return interrupted_exit_code;
    }
    save_weights(folder, run.job);
    write_run_report(folder, {.banner = banner_of(outcome, settings), .held_out_loss = outcome.held_out});
    if (!settings.quiet) print_summary(run.out, run.plan, run.report, run.watch, outcome, folder);
    if (settings.json) print_json(run.plan, run.report, outcome, folder);
    report_divergence(outcome, settings);
    return outcome.interrupted ? interrupted_exit_code : 0;
}

int train_in(const std::filesystem::path& folder, const TrainRun& run, std::int64_t budget,
             std::optional<ResumePoint>& resume) {
    const Settings& settings = run.plan.settings;
    const RunConfig config = config_of(run.plan, run.report.choice().plan, run.length, budget);
    const RunNotes notes = notes_of(run.plan, config_text(config));
    std::vector<std::string> changes;
    if (resume) {
        // Before anything is written.
        changes = reconcile(*resume, notes, settings, run.plan.data.train->size(), run.job.accumulator->optimizer());
        require_same_weights(*resume, weights_of(run.job));
    }
    if (settings.resume) remove_snapshots(folder);
    const std::int64_t steps = resume ? resume->steps() : 0;
    RunFiles files{settings.resume ? RunLog(folder, steps) : RunLog(folder), EventFile(folder),
                   RunCheckpoints(folder, settings, run.watch.checkpoint_bytes, notes)};
    if (files.log.lines() < steps) {
        changes.push_back(fmt::format("metrics.jsonl lacks {} of these steps", steps - files.log.lines()));
    }
    write_config(folder, config);
    if (!settings.quiet) print_header(run.out, run.plan, run.report, run.watch, run.length, folder);
    print_resume(run.out, resume, changes, settings, run.length);
    if (!settings.no_verify && !resume) check_decomposition(run.out, run.plan, run.job);
    Outcome outcome;
    outcome.plan = run.report.choice().plan;
    try {
        train_to_the_end(run, files, outcome);
    } catch (...) {
        // Whatever ended the run, its last step was undone: the weights are those of the step before.
        if (outcome.last.progress.steps > 0) {
            save_weights(folder, run.job);
        } else if (!resume) {
            remove_unused_folder(folder, files.events);
        }
        throw;
    }
    const int code = conclude(run, files, outcome, folder);
    if (const std::string failure = files.log.flush(); !failure.empty()) {
        throw Error(ErrorKind::usage, failure + "; its last lines are lost");
    }
    return code;
}

int train(CLI::App& command, Settings& settings, bool batch_given) {
    settings.resume = settings.resume || settings.resume_changed;
    install_budget_allocator();
    watch_interrupts();
    std::optional<RunLock> lock;
    if (!settings.run.empty() && std::filesystem::exists(settings.run)) lock.emplace(settings.run);
    if (!settings.run.empty() && !settings.resume) refuse_used_folder(settings.run);
    std::optional<ResumePoint> resume;
    if (settings.resume) resume = find_resume_point(command, settings);
    if (settings.resume && !resume) refuse_weights_without_checkpoint(settings.run);
    if (settings.resume && !resume && settings.data.empty()) {
        refuse(fmt::format("--run {} --resume: there is no checkpoint to go on from, nor --data to begin with",
                           settings.run));
    }
    std::FILE* out = settings.json ? stderr : stdout;
    if (resume) {
        for (const std::string& warning : resume->warnings) fmt::print(out, "warning: {}\n", warning);
    }
    resolve_batch(settings, batch_given);
    validate(settings);
    validate_checkpoints(settings);
    const Interval length = length_of(settings, {100, Unit::steps});
    const std::int64_t budget = memory_budget_of(settings);
    if (settings.threads > 0) at::set_num_threads(static_cast<int>(settings.threads));
    const BudgetDrill drill;
    const JobPlan plan = open_job(settings, length);
    schedule_of(settings, length, plan.data.train->tokens_per_sample(), settings.batch);
    // Before anything is measured.
    if (resume) {
        require_same_run(*resume, notes_of(plan, config_text(config_of(plan, {.micro_batch = 1}, length, budget))),
                         settings);
    }
    const Job job = make_job_to_plan(plan, budget);
    const PlanReport report = plan_job(plan, job, budget, out);
    job.accumulator->set_plan(report.choice().plan);
    set_memory_budget(budget);
    const std::filesystem::path folder = run_folder(settings, plan.model);
    if (!lock) {
        lock.emplace(folder);
        // It was not there before; who came first may be done with it already.
        if (!settings.run.empty()) refuse_used_folder(folder);
    }
    if (!lock->is_held()) {
        fmt::print(out, "warning: {} is on a file system without locks: let no other process train in it\n",
                   folder.string());
    }
    const Watch watch = watch_of(plan, report, folder);
    const TrainRun run{out, plan, job, report, watch, length, drill, resume ? &*resume : nullptr};
    return train_in(folder, run, budget, resume);
}

}  // namespace

void add_train(CLI::App& application, Action& action) {
    CLI::App* command = application.add_subcommand("train", "Train a model with the batch you want in a memory budget");
    auto settings = std::make_shared<Settings>();
    add_job_options(*command, *settings);
    add_length_options(*command, *settings, "100 steps");
    command
        ->add_option("--run", settings->run,
                     "Folder of this run; it must not hold one yet, but for --resume (default runs/MODEL-TIME)")
        ->type_name("DIR")
        ->group("Run");
    command
        ->add_flag("--no-verify", settings->no_verify,
                   "Do not check at the start that the gradient is the same however the batch is cut")
        ->group("Run");
    add_train_options(*command, *settings);
    add_checkpoint_options(*command, *settings);
    command
        ->add_flag("--quiet", settings->quiet, "Show the progress alone: neither the plan before nor the summary after")
        ->group("Run");
    command->footer(
        "Examples:\n"
        "  microbatch train --data /usr/share/games/fortunes --batch 64 --memory 64MiB --steps 200\n"
        "  microbatch train --data /usr/share/datasets/fashion-mnist --model resnet --norm group --batch 512 \\\n"
        "      --memory 100MiB --samples 60k --optimizer sgd --warmup \"5 steps\"\n"
        "  microbatch train --run runs/gpt-tiny-20261124-120000 --resume\n"
        "Written to the run's folder: config.toml, metrics.jsonl (one object a step), model.safetensors, report.html\n"
        "(charts), summary.json (what the page tells beside the log), events.out.tfevents.* (for TensorBoard),\n"
        "checkpoints/step-N (safetensors and JSON).\n"
        "The held-out loss is of as many samples as the run trained on, 1,024 at most.\n"
        "A run that diverges goes back to a snapshot, at half the rate; after --restores times it is stopped with "
        "exit\n"
        "code 4.\n"
        "Ctrl-C finishes the micro-batch, writes a checkpoint and ends with exit code 130; a second one ends at once.\n"
        "With --resume the same command line can be given first and after every end, however that came; weights that "
        "no\n"
        "checkpoint belongs to are not written over.");
    command->callback([command, settings, &action] {
        action = [command, settings] {
            refuse_empty_values(*command);
            const bool batch_given = command->get_option("--batch")->count() > 0;
            apply_config_file(*command, settings->config);
            return train(*command, *settings, batch_given);
        };
    });
}

}  // namespace microbatch::cli
