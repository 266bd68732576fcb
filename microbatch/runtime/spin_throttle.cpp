#include "microbatch/runtime/spin_throttle.h"

#include <ATen/Parallel.h>
#include <dlfcn.h>

#include <algorithm>
#include <condition_variable>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <system_error>
#include <thread>

namespace microbatch {
namespace {

constexpr double much_waiting = 0.25;  // of a core's time: another process needs the cores
constexpr double no_waiting = 0.05;
constexpr int quiet_polls = 20;  // in a row, before the threads may spin again
constexpr std::chrono::milliseconds between_looks(100);

// What GCC generates for "#pragma omp parallel", in the OpenMP that torch brings: this library is compiled without
// OpenMP.
using Parallel = void (*)(void (*work)(void*), void* data, unsigned threads, unsigned flags);

Parallel libgomp_parallel() {
    return reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
}

}  // namespace

// Sleeping OpenMP threads, more than there are cores together with torch's own.
class SpinThrottle::OversubscriptionTeam {
public:
    OversubscriptionTeam() : thread_([this] { run(); }) {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [this] { return there_; });
    }
    OversubscriptionTeam(const OversubscriptionTeam&) = delete;
    OversubscriptionTeam& operator=(const OversubscriptionTeam&) = delete;
    ~OversubscriptionTeam() {
        {
            const std::lock_guard lock(mutex_);
            over_ = true;
        }
        changed_.notify_all();
        thread_.join();
    }

private:
    void run() {
        const int cores = static_cast<int>(std::max(1U, std::thread::hardware_concurrency()));
        const auto count = static_cast<unsigned>(std::max(2, cores - at::get_num_threads() + 2));
        // A team of this thread, for the lifetime of the thread.
        if (const auto parallel = libgomp_parallel()) parallel([](void*) {}, nullptr, count, 0);
        std::unique_lock lock(mutex_);
        there_ = true;
        changed_.notify_all();
        changed_.wait(lock, [this] { return over_; });
    }

    std::mutex mutex_;
    std::condition_variable changed_;
    bool there_ = false, over_ = false;
    std::thread thread_;
};

SpinThrottle::SpinThrottle() = default;
SpinThrottle::~SpinThrottle() = default;

std::optional<double> seconds_waited_for_cores() {
    std::error_code error;
    double nanoseconds = 0.0;
    bool any = false;
    for (const auto& thread : std::filesystem::directory_iterator("/proc/self/task", error)) {
        std::ifstream file(thread.path() / "schedstat");
        double ran = 0.0, waited = 0.0;
        if (!(file >> ran >> waited)) continue;
        nanoseconds += waited;
        any = true;
    }
    if (error || !any) return std::nullopt;
    return nanoseconds * 1e-9;
}

void SpinThrottle::poll() {
    if (at::get_num_threads() == 1) {  // no thread spins
        team_.reset();
        return;
    }
    const auto now = Clock::now();
    if (waited_before_ && now - looked_ < between_looks) return;
    const std::optional<double> waited = seconds_waited_for_cores();
    if (waited && waited_before_) {
        // Less than before: a thread has ended, and its time is no longer counted.
        decide(std::max(0.0, *waited - *waited_before_) / std::chrono::duration<double>(now - looked_).count());
    }
    waited_before_ = waited;
    looked_ = now;
}

void SpinThrottle::decide(double waiting_share) {
    quiet_polls_ = waiting_share < no_waiting ? quiet_polls_ + 1 : 0;
    if (!active() && waiting_share > much_waiting) {
        team_ = std::make_unique<OversubscriptionTeam>();
    } else if (active() && quiet_polls_ >= quiet_polls) {
        team_.reset();
    }
}

}  // namespace microbatch
