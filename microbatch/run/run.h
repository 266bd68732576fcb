#pragma once

#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "microbatch/io/checkpoint_store.h"
#include "microbatch/io/event_file.h"
#include "microbatch/run/outcome.h"
#include "microbatch/run/run_folder.h"
#include "microbatch/run/run_log.h"
#include "microbatch/run/trainer.h"

namespace microbatch {

/// What whoever started a run wants to see of it. No call may throw.
class RunObserver {
public:
    virtual ~RunObserver() = default;

    /// After every step that was made, when it is logged.
    virtual void on_step(const Outcome&) {}

    /// What happens seldom: a warning, one line.
    virtual void on_note(const std::string&) {}
};

/// When a run writes checkpoints, and how many stay.
struct RunCheckpointOptions {
    bool enabled = true;
    Interval every{100, Unit::steps};  ///< 0: when the run is interrupted, and at its end
    CheckpointOptions store = {};      ///< sync_first is set by the run
};

struct RunOptions {
    TrainerOptions trainer = {};
    RunCheckpointOptions checkpoints = {};
    std::string config = {};  ///< written as config.toml where it is not empty
    StateDict notes = {};     ///< kept in every checkpoint under `notes/`
    /// What is logged of a step beside the trainer's report; without it the CPU allocator's peak, if it is installed.
    std::function<StepMeasures(const TrainerReport&, std::int64_t copy_bytes)> measures = {};
    std::int64_t state_bytes = 0;    ///< of parameters and optimizer state, to compare with the free disk space
    std::int64_t planned_batch = 0;  ///< samples of a full batch, for its median time
    Plan plan = {};                  ///< by which full batches are planned to run
    RunObserver* observer = nullptr;
};

/// A training run in a folder: `metrics.jsonl` and TensorBoard's events as it goes on, checkpoints on the way and at
/// its end, `model.safetensors` when it ends. A run that is killed at any instant resumes bit-for-bit:
///
///     RunFolder folder("runs/mine", /*resume=*/true);
///     Run run(folder, accumulator, dataset, loss, {.trainer = {.batch = 64, .length = {1000, Unit::steps}}});
///     const Outcome& outcome = run.train();
///
/// Faults:    what cannot be written is noted, and the run goes on; it is written when it can be.
/// Ownership: borrows the folder, accumulator, dataset and observer, which must outlive this.
/// Threads:   no two calls at the same time.
class Run {
public:
    /// Opens the log and the checkpoints, and resumes from the folder's state, which is used up.
    /// Errors: as RunLog, EventFile, CheckpointStore, Trainer and its load.
    Run(RunFolder& folder, Accumulator& accumulator, const Dataset& dataset, LossFunction loss, RunOptions options);

    Run(const Run&) = delete;
    Run& operator=(const Run&) = delete;

    /// Trains until the run is done, the trainer's `stop` says so, it has diverged, or it is out of memory whatever the
    /// micro-batch. What came of it is in outcome() in any case, and the last state in a checkpoint, unless it
    /// diverged. Weights are written at the end, and when an exception ends it.
    const Outcome& train();

    Outcome& outcome() { return outcome_; }
    Trainer& trainer() { return trainer_; }

    /// Lines that the log lacks of the steps before a resumed run.
    std::int64_t missing_lines() const { return missing_lines_; }

    /// Writes model.safetensors. Not over those of a run before where this one has made no step that was applied, or
    /// diverged. Errors: as write_safetensors().
    void save_weights();

    /// Removes what a run that made no step has written.
    void remove_unused() const { folder_.remove_unused(events_.path()); }

    /// Why the last lines of the log are lost; empty if they are written.
    std::string flush() { return log_.flush(); }

private:
    StateDict state() const;
    TrainerOptions trainer_options() const;
    void resume(const StateDict& state);
    bool step();
    std::optional<StateDict> state_to_save();
    void save_where_due();
    bool save_now();
    void end(bool left_half_way);
    void compare_with_disk() const;
    void save_weights_after_failure();
    void note(const std::string& text) const;
    void note_once(bool& failing, const std::string& failure, const char* consequence);
    void note_checkpoint(const std::string& warning);
    void note_checkpoints();

    RunFolder& folder_;
    Accumulator& accumulator_;
    RunOptions options_;
    RunLog log_;
    EventFile events_;
    std::unique_ptr<CheckpointStore> checkpoints_;  // null: none are written
    Trainer trainer_;
    Outcome outcome_ = {};
    std::int64_t missing_lines_ = 0;
    bool had_weights_ = false;  // of a run before
    bool applied_ = false;      // a step, by this process
    bool log_fails_ = false, events_fail_ = false;
    std::int64_t times_ = 0;          // that the interval between checkpoints has gone by, at the last step
    bool checkpoint_is_due_ = false;  // since one of those times
    std::string checkpoint_warning_;  // the last one
};

}  // namespace microbatch
