#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "microbatch/state/state_dict.h"

namespace microbatch {

/// The folder of the checkpoints of a run.
std::filesystem::path checkpoints_of(const std::filesystem::path& run);

/// Locks the folder of a run for this process during its lifetime; however the process ends, the lock is released.
///
/// Threads: none.
class RunLock {
public:
    /// Creates the folder if it is missing.
    /// Errors: ErrorKind::usage if another process holds the lock, or the folder cannot be created. On a file system
    ///         without locks, the folder is used without one: see is_held().
    explicit RunLock(const std::filesystem::path& folder);
    RunLock(const RunLock&) = delete;
    RunLock& operator=(const RunLock&) = delete;
    ~RunLock();

    /// False if the file system has no locks.
    bool is_held() const { return held_; }

private:
    int descriptor_ = -1;
    bool held_ = false;
};

/// What a process does with the folder of a run.
enum class RunAccess {
    trains,  ///< it writes
    follows  ///< it only reads the state to resume from: another rank writes
};

/// The folder of a run: locked against other processes, and either new or resumed.
class RunFolder {
public:
    /// Locks an existing folder; lock() creates a missing one. With `resume`, the newest valid checkpoint, if there is
    /// one, becomes state().
    /// Errors: ErrorKind::usage if another process is training in it, or it has a run and `resume` is false (nothing is
    ///         overwritten, including weights without a checkpoint); ErrorKind::bad_data if there are checkpoints but
    ///         none is valid, or the newest has a different format version.
    explicit RunFolder(std::filesystem::path path, bool resume = false, RunAccess access = RunAccess::trains);

    /// Creates the folder and locks it, if necessary. Errors: as the constructor.
    void lock();

    /// False if the file system has no locks.
    bool is_locked() const { return lock_ && lock_->is_held(); }

    const std::filesystem::path& path() const { return path_; }
    bool resumes() const { return resume_; }

    /// The state to resume from; empty for a new run.
    std::optional<StateDict>& state() { return state_; }
    const std::optional<StateDict>& state() const { return state_; }

    /// For a run that diverged and continues with other settings: replaces the state by the newest healthy checkpoint,
    /// none of whose roll-backs are used. Returns false, and adds a warning, if no checkpoint is healthy.
    bool use_healthy();

    /// The steps of the newer checkpoint that it replaced; empty if it replaced no checkpoint.
    std::optional<std::int64_t> passed_over() const { return passed_over_; }

    const std::vector<std::string>& warnings() const { return warnings_; }          ///< about skipped checkpoints
    const std::vector<std::filesystem::path>& damaged() const { return damaged_; }  ///< the skipped ones

    /// Deletes snapshots that only a killed process could use.
    void remove_snapshots() const;

    /// Deletes the files of a run that made no step, so that it can be started again.
    void remove_unused(const std::filesystem::path& events) const;

private:
    void refuse_used() const;
    void refuse_files_without_checkpoint() const;
    bool find_state(bool healthy);

    std::filesystem::path path_;
    bool resume_;
    std::optional<RunLock> lock_;
    std::optional<StateDict> state_;
    std::optional<std::int64_t> passed_over_;
    std::vector<std::string> warnings_;
    std::vector<std::filesystem::path> damaged_;
};

}  // namespace microbatch
