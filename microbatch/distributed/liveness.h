#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "microbatch/distributed/backend.h"

namespace microbatch {

/// Shows the other ranks that this one is alive, and finds those that are not: each counts up a number of its own in the
/// store, by a thread that does nothing else.
///
/// Threads: any.
class Liveness {
public:
    Liveness(const c10::intrusive_ptr<c10d::Store>& store, int rank, int size, std::chrono::milliseconds silence);
    Liveness(const Liveness&) = delete;
    Liveness& operator=(const Liveness&) = delete;
    ~Liveness();

    /// What is known of a rank that has ended: "rank 2 has ended: out of memory". Empty if none has.
    std::string lost() const;

    /// Waits until a rank is known to be lost, at most somewhat longer than a rank may be silent.
    std::string wait_for_lost() const;

    /// Tells the others that this rank ends, and why.
    void leave(const std::string& why) noexcept;

private:
    void run();
    void look();

    c10::intrusive_ptr<c10d::Store> store_;
    int rank_, size_;
    std::chrono::milliseconds silence_;
    mutable std::mutex mutex_;
    mutable std::condition_variable changed_;
    bool ends_ = false;
    std::string lost_;
    std::vector<std::int64_t> beats_;  // of each rank when it was last seen to change, and when that was
    std::vector<std::chrono::steady_clock::time_point> seen_;
    std::thread thread_;
};

}  // namespace microbatch
