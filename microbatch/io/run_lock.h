#pragma once

#include <filesystem>

namespace microbatch {

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

}  // namespace microbatch
