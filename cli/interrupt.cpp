#include "cli/interrupt.h"

#include <atomic>
#include <csignal>

namespace microbatch::cli {
namespace {

constexpr int watched[] = {SIGINT, SIGTERM, SIGHUP};

std::atomic<bool> signal_came = false;
static_assert(std::atomic<bool>::is_always_lock_free);

extern "C" void remember(int) {
    signal_came = true;
    for (const int one : watched) {
        struct sigaction action {};
        sigaction(one, nullptr, &action);
        if (action.sa_handler == remember) std::signal(one, SIG_DFL);
    }
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
    return signal_came;
}

}  // namespace microbatch::cli
