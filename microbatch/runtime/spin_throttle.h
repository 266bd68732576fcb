#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>

namespace microbatch {

/// Keeps torch's threads from competing with other processes for the cores.
///
/// Between two parallel regions, OpenMP's threads spin for some milliseconds before they sleep. On a core that another
/// process also needs, this uses up the thread's time slices, and when there is work again, the thread must wait to be
/// scheduled: a step takes five times as long. While threads have to wait for a core, this makes them sleep
/// immediately: it starts an oversubscription team of sleeping threads, more than there are cores, because libgomp then
/// spins only briefly. When the cores are free again, the team ends.
///
/// State:    changes no results, only how threads wait. Does nothing if the system does not report waiting times
///           (Linux: /proc/self/task/*/schedstat), or OpenMP is not libgomp.
/// Cost:     a poll takes about 10 microseconds per thread, at most ten times per second.
/// Threads:  no two calls at the same time.
class SpinThrottle {
public:
    SpinThrottle();
    SpinThrottle(const SpinThrottle&) = delete;
    SpinThrottle& operator=(const SpinThrottle&) = delete;
    ~SpinThrottle();

    /// Polls whether the threads have waited for a core since the last poll; to be called before or after a batch.
    void poll();

    /// Decides by the time that threads waited for a core, as a share of the elapsed time.
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

/// Seconds that the threads of this process have waited for a core so far; empty if the system does not report it.
std::optional<double> seconds_waited_for_cores();

}  // namespace microbatch
