#pragma once

#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "microbatch/io/checkpoint_store.h"
#include "microbatch/io/event_file.h"
#include "microbatch/run/checkpoint_parts.h"
#include "microbatch/run/outcome.h"
#include "microbatch/run/run_folder.h"
#include "microbatch/run/run_log.h"
#include "microbatch/run/trainer.h"

namespace microbatch {

/// Receives the events of a run. No call may throw.
class RunObserver {
public:
    virtual ~RunObserver() = default;

    /// Called after every completed step, when it has been logged.
    virtual void on_step(const Outcome&) {}

    /// Called for rare events: a warning of one line.
    virtual void on_note(const std::string&) {}
};

/// When a run writes checkpoints, and how many are kept.
struct RunCheckpointOptions {
    bool enabled = true;
    Interval every{100, Unit::steps};  ///< 0: only on interrupt and at the end
    CheckpointOptions store = {};      ///< sync_first is set by the run
};

struct RunOptions {
    TrainerOptions trainer = {};
    RunCheckpointOptions checkpoints = {};
    std::string config = {};  ///< written to config.toml if it is not empty
    StateDict notes = {};     ///< stored in every checkpoint under `notes/`
    /// Returns additional data to log for a step; by default, the CPU allocator's peak, if it is installed.
    std::function<StepMeasures(const TrainerReport&, std::int64_t copy_bytes)> measures = {};
    std::int64_t state_bytes = 0;    ///< of parameters and optimizer state, compared with the free disk space
    std::int64_t planned_batch = 0;  ///< samples of a full batch, for its median time
    Plan plan = {};                  ///< the plan for full batches
    RunObserver* observer = nullptr;
};

/// A training run in a folder: writes `metrics.jsonl`, TensorBoard events and checkpoints during training, and
/// `model.safetensors` at the end. A run that is killed at any instant resumes bit-for-bit:
///
///     RunFolder folder("runs/mine", /*resume=*/true);
///     Run run(folder, accumulator, dataset, loss, {.trainer = {.batch = 64, .length = {1000, Unit::steps}}});
///     const Outcome& outcome = run.train();
///
/// Faults:    what cannot be written is reported, and the run continues; it is written when possible.
/// Processes: this is the run of the first rank; the others follow(). With sharded optimizer state, each writes its part of
///            a checkpoint, in the foreground; an exception then ends the run without one.
/// Ownership: borrows the folder, accumulator, dataset and observer, which must outlive this.
/// Threads:   no two calls at the same time.
class Run {
public:
    /// Opens the log and the checkpoints, and resumes from the state of the folder, which it consumes.
    /// Errors: as RunLog, EventFile, CheckpointStore, Trainer and its load.
    Run(RunFolder& folder, Accumulator& accumulator, const Dataset& dataset, LossFunction loss, RunOptions options);

    Run(const Run&) = delete;
    Run& operator=(const Run&) = delete;

    /// Trains until the run is complete, `stop` of the trainer returns true, the run has diverged, or it is out of
    /// memory whatever the micro-batch. In each case, outcome() has the results, and a checkpoint has the last state,
    /// unless the run diverged. Weights are written at the end, and also when an exception ends the run.
    const Outcome& train();

    Outcome& outcome() { return outcome_; }
    Trainer& trainer() { return trainer_; }

    /// The number of steps before a resumed run that are missing in the log.
    std::int64_t missing_lines() const { return missing_lines_; }

    /// Writes model.safetensors. Does not overwrite the weights of a previous run if this run has applied no step or
    /// has diverged. Errors: as write_safetensors().
    void save_weights();

    /// Deletes the files of a run that made no step.
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
    std::unique_ptr<PartsOfRanks> parts_;           // if the optimizer's state is sharded
    std::unique_ptr<CheckpointStore> checkpoints_;  // null: checkpoints are off
    Trainer trainer_;
    Outcome outcome_ = {};
    std::int64_t missing_lines_ = 0;
    bool had_weights_ = false;  // of a previous run
    bool applied_ = false;      // a step, by this process
    bool log_fails_ = false, events_fail_ = false;
    std::int64_t times_ = 0;          // how many times the checkpoint interval had passed at the last step
    bool checkpoint_is_due_ = false;  // since one of those times
    std::string checkpoint_warning_;  // the last one
};

}  // namespace microbatch
