#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>

namespace microbatch {

/// Keeps torch's threads from fighting with other processes for the cores.
///
/// Between two pieces of work OpenMP's threads spin for some milliseconds before they sleep. On a core that somebody
/// else wants, too, that uses up the thread's time slices, and when there is work for it again it must wait for its
/// turn: a step becomes five times as long. While threads are seen to wait for a core, this makes them sleep at once,
/// by starting more OpenMP threads than there are cores, which libgomp takes as the sign to spin briefly; they
/// themselves sleep. When nobody is in the way any longer, they end.
///
/// State:    no number changes, only who waits how. Where the system does not say how long threads waited
///           (Linux: /proc/self/task/*/schedstat), or OpenMP is not libgomp, it does nothing.
/// Cost:     a look takes some 10 microseconds a thread, at most ten times a second.
/// Threads:  no two calls at the same time.
class SpinThrottle {
public:
    SpinThrottle();
    SpinThrottle(const SpinThrottle&) = delete;
    SpinThrottle& operator=(const SpinThrottle&) = delete;
    ~SpinThrottle();

    /// Call it before or after a batch: looks whether the threads had to wait since the look before.
    void poll();

    /// Decides by a share of time that threads waited for a core, of the time that went by.
    void decide(double waiting_share);

    bool active() const { return team_ != nullptr; }

private:
    class OversubscriptionTeam;
    using Clock = std::chrono::steady_clock;

    std::unique_ptr<OversubscriptionTeam> team_;
    std::optional<double> waited_before_;  // in seconds, all threads
    Clock::time_point looked_;
    int quiet_polls_ = 0;
};

/// Seconds that the threads of this process have waited for a core so far; none where the system does not tell.
std::optional<double> seconds_waited_for_cores();

}  // namespace microbatch
