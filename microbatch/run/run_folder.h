#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "microbatch/state/state_dict.h"

namespace microbatch {

/// Where a run's checkpoints are.
std::filesystem::path checkpoints_of(const std::filesystem::path& run);

/// A run's folder, held by this process as long as this lives; however the process ends, the folder is free then.
///
/// Threads: none.
class RunLock {
public:
    /// Makes the folder where it is missing.
    /// Errors: ErrorKind::usage if another process holds it, or it cannot be made. On a file system that has no locks
    /// it
    ///         is taken without one: see is_held().
    explicit RunLock(const std::filesystem::path& folder);
    RunLock(const RunLock&) = delete;
    RunLock& operator=(const RunLock&) = delete;
    ~RunLock();

    /// False where the file system has no locks.
    bool is_held() const { return held_; }

private:
    int descriptor_ = -1;
    bool held_ = false;
};

/// The folder of a run: locked against other processes, and either new or resumed.
class RunFolder {
public:
    /// Locks a folder that is there; one that is not is made by lock(). With `resume` the newest checkpoint that is
    /// whole becomes state(), if there is one.
    /// Errors: ErrorKind::usage if another process trains in it, or it holds a run and is not to be resumed (nothing is
    ///         overwritten; also weights that no checkpoint belongs to); ErrorKind::bad_data if there are checkpoints
    ///         and none is whole, or the newest is for another version.
    explicit RunFolder(std::filesystem::path path, bool resume = false);

    /// Makes the folder and locks it, if it is not. Errors: as the constructor.
    void lock();

    /// False where the file system has no locks.
    bool is_locked() const { return lock_ && lock_->is_held(); }

    const std::filesystem::path& path() const { return path_; }
    bool resumes() const { return resume_; }

    /// What the run is resumed from; none: it begins.
    std::optional<StateDict>& state() { return state_; }
    const std::optional<StateDict>& state() const { return state_; }

    /// Takes the newest checkpoint that was healthy in the place of a newer one. False if there is none.
    bool use_healthy();

    /// The steps of that newer one; none if there is no such.
    std::optional<std::int64_t> passed_over() const { return passed_over_; }

    const std::vector<std::string>& warnings() const { return warnings_; }          ///< of checkpoints skipped
    const std::vector<std::filesystem::path>& damaged() const { return damaged_; }  ///< those

    /// Removes snapshots that only a process that was killed could read.
    void remove_snapshots() const;

    /// Removes what a run that made no step has written, so that it can be started again.
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
