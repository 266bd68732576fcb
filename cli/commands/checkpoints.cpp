#include "cli/commands/checkpoints.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "cli/options/refuse.h"
#include "microbatch/core/units.h"

namespace microbatch::cli {
namespace {

Interval every_of(const Settings& settings) {
    return read_flag("--checkpoint-every", [&] { return parse_interval(settings.checkpoint_every); });
}

std::optional<Interval> keep_every_of(const Settings& settings) {
    if (settings.keep_every.empty()) return std::nullopt;
    const Interval every = read_flag("--keep-every", [&] { return parse_interval(settings.keep_every); });
    if (every.count < 1) refuse(fmt::format("--keep-every is {}; it must be above 0", settings.keep_every));
    return every;
}

std::string first_line(const std::string& text) {
    return text.substr(0, text.find('\n'));
}

}  // namespace

void validate_checkpoints(const Settings& settings) {
    every_of(settings);
    keep_every_of(settings);
    if (settings.no_checkpoints && settings.resume)
        refuse("--no-checkpoints contradicts --resume, which goes on from one");
}

std::string describe_checkpoints(const Settings& settings) {
    if (settings.no_checkpoints) return "none: a run that is killed is lost";
    const Interval every = every_of(settings);
    const std::string stay =
        settings.keep_every.empty() ? std::string() : fmt::format(", and one every {}", settings.keep_every);
    return fmt::format("{}, the newest {} stay{}",
                       every.count == 0 ? "at the end, and when it is interrupted" : "every " + to_string(every),
                       settings.keep, stay);
}

RunCheckpoints::RunCheckpoints(const std::filesystem::path& run, const Settings& settings, std::int64_t memory_bytes,
                               RunNotes notes)
    : every_(every_of(settings)), notes_(std::move(notes)) {
    if (settings.no_checkpoints) return;
    store_ = std::make_unique<CheckpointStore>(
        checkpoints_of(run), CheckpointOptions{.keep = settings.keep,
                                               .keep_every = keep_every_of(settings),
                                               .memory_bytes = std::max<std::int64_t>(0, memory_bytes),
                                               .sync_first = {run / "metrics.jsonl", run}});
}

void RunCheckpoints::go_on_from(const TrainerState& state, const std::vector<std::filesystem::path>& damaged) {
    if (store_) store_->go_on_from(state, damaged);
    if (every_.count > 0) times_ = state.progress.in(every_.unit) / every_.count;
}

// None, and a warning, where there is no memory even to say what is to be written.
std::optional<Checkpoint> RunCheckpoints::checkpoint_of(const Trainer& trainer, const Outcome& outcome) {
    notes_.outcome = outcome;
    try {
        return Checkpoint{trainer.state(), to_json_text(notes_)};
    } catch (const std::exception& error) {
        warnings_.push_back(fmt::format("the checkpoint of step {} is not written: {}", trainer.progress().steps,
                                        first_line(error.what())));
        return std::nullopt;
    }
}

bool RunCheckpoints::after_step(const Trainer& trainer, const Outcome& outcome) {
    if (!store_ || every_.count == 0) return false;
    const std::int64_t times = trainer.progress().in(every_.unit) / every_.count;
    due_ = due_ || times > times_;
    times_ = times;
    // The one before is still being written: a step waits for none.
    if (!due_ || store_->is_busy()) return false;
    due_ = false;
    std::optional<Checkpoint> checkpoint = checkpoint_of(trainer, outcome);
    if (checkpoint) store_->save(std::move(*checkpoint));
    return checkpoint.has_value();
}

bool RunCheckpoints::save_now(const Trainer& trainer, const Outcome& outcome) {
    if (!store_) return false;
    const std::optional<Checkpoint> checkpoint = checkpoint_of(trainer, outcome);
    return checkpoint && store_->save_now(*checkpoint);
}

std::vector<std::string> RunCheckpoints::warnings() {
    std::vector<std::string> all = std::exchange(warnings_, {});
    if (store_) {
        for (std::string& warning : store_->warnings()) all.push_back(std::move(warning));
    }
    return all;
}

}  // namespace microbatch::cli
