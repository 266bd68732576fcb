#include "microbatch/run/run.h"

#include <chrono>
#include <cmath>
#include <utility>

#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"
#include "microbatch/io/file_system.h"
#include "microbatch/io/safetensors.h"
#include "microbatch/memory/meter.h"

namespace microbatch {
namespace {

double seconds_since(std::chrono::steady_clock::time_point started) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
}

std::int64_t steps_of(const RunFolder& folder) {
    return folder.state() ? StateReader(*folder.state()).section("data").count("steps") : 0;
}

// Opened before the run writes anything.
RunLog open_log(RunFolder& folder) {
    folder.lock();
    if (folder.resumes()) folder.remove_snapshots();
    return folder.resumes() ? RunLog(folder.path(), steps_of(folder)) : RunLog(folder.path());
}

// The numbers that TensorBoard draws.
std::vector<Scalar> scalars_of(const StepRecord& record) {
    std::vector<Scalar> scalars;
    for (const StepField& field : step_fields()) {
        if (field.scalar == nullptr) continue;
        if (const auto number = field.number(record)) scalars.push_back({field.scalar, *number});
    }
    return scalars;
}

// How often an interval has gone by.
std::int64_t times_of(const Interval& every, const Progress& progress) {
    return every.count > 0 ? progress.in(every.unit) / every.count : 0;
}

// The part of the state that can be listed.
std::int64_t bytes_in(const std::filesystem::path& folder) {
    std::int64_t bytes = 0;
    std::error_code failure;
    std::filesystem::recursive_directory_iterator entry(folder, failure);
    for (; !failure && entry != std::filesystem::recursive_directory_iterator(); entry.increment(failure)) {
        if (entry->is_regular_file(failure)) bytes += static_cast<std::int64_t>(entry->file_size(failure));
    }
    return bytes;
}

}  // namespace

Run::Run(RunFolder& folder, Accumulator& accumulator, const Dataset& dataset, LossFunction loss, RunOptions options)
    : folder_(folder),
      accumulator_(accumulator),
      options_(std::move(options)),
      log_(open_log(folder)),
      events_(folder.path()),
      trainer_(accumulator, dataset, std::move(loss), trainer_options()),
      had_weights_(std::filesystem::exists(folder.path() / "model.safetensors")) {
    if (accumulator_.is_sharded()) parts_ = std::make_unique<PartsOfRanks>(accumulator_.reducer());
    if (options_.checkpoints.enabled) {
        CheckpointOptions store = options_.checkpoints.store;
        store.parts = parts_.get();
        // The log must be on the disk before a checkpoint that follows it.
        store.sync_first = {folder_.path() / "metrics.jsonl", folder_.path()};
        checkpoints_ = std::make_unique<CheckpointStore>(checkpoints_of(folder_.path()), std::move(store));
    }
    if (!options_.config.empty()) write_whole(folder_.path() / "config.toml", options_.config);
    if (folder_.state()) {
        move_to_devices_of(accumulator_.model(), *folder_.state());
        resume(*folder_.state());
    }
    // Its files are open as long as its tensors may be read.
    folder_.state().reset();
    // Steps that run again are not drawn from an earlier process.
    if (folder_.resumes()) events_.go_on(trainer_.progress().steps);
    outcome_.plan = options_.plan;
    compare_with_disk();
}

// The checkpoint's copy is reclaimed first: this costs only time.
TrainerOptions Run::trainer_options() const {
    TrainerOptions options = options_.trainer;
    options.reclaimers.insert(options.reclaimers.begin(),
                              {[this] { return checkpoints_ && checkpoints_->release(); }, /*counts=*/false});
    return options;
}

void Run::resume(const StateDict& state) {
    const StateReader reader(state);
    Outcome before = Outcome::from(reader.section("outcome"));
    load(trainer_, reader);
    const Progress& progress = trainer_.progress();
    if (checkpoints_) {
        checkpoints_->go_on_from(state, folder_.damaged());
        checkpoints_->abandon_newer();
    }
    times_ = times_of(options_.checkpoints.every, progress);
    missing_lines_ = progress.steps - log_.lines();
    outcome_ = std::move(before);
    outcome_.last.progress = progress;
    outcome_.resumed_from = progress.steps;
}

// The space for the kept checkpoints, one more while it is written, and the weights; each checkpoint has two snapshots.
void Run::compare_with_disk() const {
    const RunCheckpointOptions& checkpoints = options_.checkpoints;
    const std::int64_t checkpoint = (options_.trainer.recovery ? 3 : 1) * options_.state_bytes;
    std::int64_t needed = options_.state_bytes;
    if (checkpoints.enabled)
        needed += (checkpoints.store.keep + 1) * checkpoint - bytes_in(checkpoints_of(folder_.path()));
    const std::string lack = lack_of_space(folder_.path(), std::max<std::int64_t>(0, needed));
    if (lack.empty()) return;
    note(str_cat("warning: checkpoints and weights may fill the disk", lack, " in ", folder_.path().string(),
                 checkpoints.enabled ? ": older checkpoints will then be deleted for new ones" : ""));
}

StateDict Run::state() const {
    StateDict state = state_of(trainer_);
    outcome_.save(StateWriter(state, "outcome/"));
    state.merge("notes/", options_.notes);
    return state;
}

const Outcome& Run::train() {
    const double seconds_before = outcome_.seconds;
    const auto started = std::chrono::steady_clock::now();
    bool left_half_way = false;
    try {
        const auto ends = [this] { return ends_on_any_rank(accumulator_, options_.trainer, outcome_.diverged()); };
        while (!trainer_.done() && !left_half_way && !ends()) {
            left_half_way = !step();
            outcome_.seconds = seconds_before + seconds_since(started);
        }
    } catch (...) {
        // Whatever it was, the step has not changed the trainer.
        if (trainer_.progress().steps > 0) {
            if (!parts_) save_now();  // others may no longer be there to write theirs
            save_weights_after_failure();
        }
        note_checkpoints();
        throw;
    }
    end(left_half_way);
    return outcome_;
}

// Runs one step and writes all its records. False if it was interrupted in the middle of its batch.
bool Run::step() {
    require_that(accumulator_.is_sharded() == (parts_ != nullptr),
                 "the optimizer's state was sharded after the run began: shard it before");
    const at::Device device = device_of(accumulator_.parameters());
    reset_peak_of(device);
    const std::int64_t copy_bytes = checkpoints_ ? checkpoints_->memory_bytes() : 0;
    const TrainerReport report = trainer_.step();
    if (report.paused) {
        if (!report.warning.empty()) note(report.warning);
        return false;
    }
    outcome_.last = report;
    applied_ = applied_ || report.step.applied;
    StepMeasures measures = options_.measures ? options_.measures(report, copy_bytes) : StepMeasures{};
    measures.peak_bytes = memory_use_of(device).peak_bytes;
    outcome_.add(measures.peak_bytes, measures.predicted_peak_bytes, options_.planned_batch);
    const StepRecord record = record_of(report, measures);
    const std::string log_failure = log_.write(record);
    const std::string event_failure = events_.write(record.step, scalars_of(record));
    if (options_.observer != nullptr) options_.observer->on_step(outcome_);
    if (!outcome_.diverged()) save_where_due();
    if (parts_) parts_->end();
    note_once(log_fails_, log_failure, "; the run continues, and the lines will be written when possible");
    note_once(events_fail_, event_failure, "; the run continues without TensorBoard events until they can be written");
    note_checkpoints();
    return true;
}

// None, and a note, where there is not even memory to list what is to be written.
std::optional<StateDict> Run::state_to_save() {
    try {
        return state();
    } catch (const std::exception&) {
        const std::string why = message_of(std::current_exception());
        note_checkpoint(str_cat("the checkpoint of step ", trainer_.progress().steps,
                                " was not written: ", why.substr(0, why.find('\n'))));
        return std::nullopt;
    }
}

void Run::save_where_due() {
    const Interval& every = options_.checkpoints.every;
    if (!checkpoints_ || every.count == 0) return;
    const std::int64_t times = times_of(every, trainer_.progress());
    checkpoint_is_due_ = checkpoint_is_due_ || times > times_;
    times_ = times;
    // The previous one is still being written: a step does not wait for it.
    if (!checkpoint_is_due_ || checkpoints_->is_busy()) return;
    checkpoint_is_due_ = false;
    const auto started = std::chrono::steady_clock::now();
    std::optional<StateDict> all = state_to_save();
    if (!all) return;
    checkpoints_->save(std::move(*all));
    outcome_.checkpoint_seconds += seconds_since(started);
}

// True if it, or one of the same point, is on the disk.
bool Run::save_now() {
    if (!checkpoints_) return false;
    const std::optional<StateDict> all = state_to_save();
    return all && checkpoints_->save_now(*all);
}

void Run::end(bool left_half_way) {
    const StepReport& last = outcome_.last.step;
    outcome_.ended_in_nan = trainer_.done() && outcome_.refused_in_a_row > 0 &&
                            !(std::isfinite(last.loss) && std::isfinite(last.gradient_norm));
    outcome_.interrupted = !trainer_.done() && !outcome_.diverged();
    if (!outcome_.diverged() && (trainer_.progress().steps > 0 || left_half_way)) {
        outcome_.checkpointed = save_now();
    }
    if (parts_) parts_->end();
    if (checkpoints_) {
        checkpoints_->release();
        note_checkpoints();
        outcome_.checkpoints = checkpoints_->written();
        if (outcome_.diverged()) outcome_.healthy_checkpoint = checkpoints_->newest_healthy();
    }
    // The written weights are those of the last step, not those in the middle of a batch.
    trainer_.discard_partial();
    if (trainer_.progress().steps > 0) save_weights();
}

void Run::save_weights() {
    // A run that was killed between its last checkpoint and its weights makes no step when it is resumed.
    if (had_weights_ && ((!applied_ && !trainer_.done()) || outcome_.diverged())) return;
    accumulator_.require_whole_update();
    const NamedTensors weights = weights_of(accumulator_);
    try {
        write_safetensors(folder_.path() / "model.safetensors", weights);
    } catch (const Error& error) {
        std::int64_t bytes = 0;
        for (const NamedTensor& weight : weights) bytes += static_cast<std::int64_t>(weight.tensor.nbytes());
        throw Error(error.kind(), error.what() + lack_of_space(folder_.path(), bytes));
    }
    outcome_.weights_written = true;
}

// The reason that ended the run is the reason that is reported.
void Run::save_weights_after_failure() {
    try {
        save_weights();
    } catch (const Error& error) {
        note(str_cat("warning: ", error.what()));
    }
}

void Run::note(const std::string& text) const {
    if (options_.observer != nullptr) options_.observer->on_note(text);
}

void Run::note_once(bool& failing, const std::string& failure, const char* consequence) {
    if (!failure.empty() && !failing) note("warning: " + failure + consequence);
    failing = !failure.empty();
}

void Run::note_checkpoint(const std::string& warning) {
    if (warning == checkpoint_warning_) return;  // the same warning each time, such as that the log is gone
    checkpoint_warning_ = warning;
    note(str_cat("warning: ", warning, "; the run continues, and earlier checkpoints are unchanged"));
}

void Run::note_checkpoints() {
    if (!checkpoints_) return;
    for (const std::string& warning : checkpoints_->warnings()) note_checkpoint(warning);
}

}  // namespace microbatch
