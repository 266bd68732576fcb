#include "cli/commands/interrupt.h"

#include <atomic>
#include <csignal>
#include <cstdint>
#include <ctime>

namespace microbatch::cli {
namespace {

constexpr int watched[] = {SIGINT, SIGTERM, SIGHUP};

constexpr std::int64_t same_signal = 200'000'000;  // nanoseconds

std::atomic<std::int64_t> came_at = 0;  // monotonic clock; 0 means not yet
static_assert(std::atomic<std::int64_t>::is_always_lock_free);

std::int64_t now() {
    timespec time{};
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * std::int64_t{1'000'000'000} + time.tv_nsec + 1;
}

extern "C" void remember(int number) {
    const std::int64_t at = now();
    std::int64_t first = 0;
    if (came_at.compare_exchange_strong(first, at) || at - first < same_signal) return;
    std::signal(number, SIG_DFL);
    std::raise(number);  // takes effect when this returns
}

}  // namespace

void watch_interrupts() {
    struct sigaction action {};
    action.sa_handler = remember;
    action.sa_flags = SA_RESTART;
    for (const int one : watched) {
        struct sigaction before {};
        sigaction(one, nullptr, &before);
        if (before.sa_handler != SIG_IGN) sigaction(one, &action, nullptr);
    }
}

bool interrupted() {
    return came_at != 0;
}

}  // namespace microbatch::cli
