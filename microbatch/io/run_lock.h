#pragma once

#include <filesystem>

namespace microbatch {

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

}  // namespace microbatch
