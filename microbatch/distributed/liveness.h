#pragma once

#include <chrono>
#include <memory>
#include <string>
#include <thread>

#include "microbatch/distributed/backend.h"

namespace microbatch {

/// Shows the other ranks that this one is alive, and finds those that are not: each counts up a number of its own in the
/// store, by a thread that does nothing else. A rank that has not begun yet is not missed.
///
/// Threads: any.
class Liveness {
public:
    Liveness(const c10::intrusive_ptr<c10d::Store>& store, int rank, int size, std::chrono::milliseconds silence);
    Liveness(const Liveness&) = delete;
    Liveness& operator=(const Liveness&) = delete;
    ~Liveness();

    /// What a rank that has begun leaves in the store.
    static std::string key_of(int rank);

    /// What is known of a rank that has ended: "rank 2 has ended: out of memory". Empty if none has.
    std::string lost() const;

    /// Waits until a rank is known to be lost, at most somewhat longer than a rank may be silent.
    std::string wait_for_lost() const;

    /// Tells the others that this rank ends, and why.
    void leave(const std::string& why) noexcept;

private:
    struct Watch;

    std::shared_ptr<Watch> watch_;  // shared with the thread, which may hang with the store
    std::thread thread_;
};

}  // namespace microbatch
