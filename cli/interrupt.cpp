#include "cli/interrupt.h"

#include <csignal>

namespace microbatch::cli {
namespace {

volatile std::sig_atomic_t signal_came = 0;

extern "C" void remember(int) {
    signal_came = 1;
}

}  // namespace

void watch_interrupts() {
    struct sigaction action {};
    action.sa_handler = remember;
    action.sa_flags = static_cast<int>(SA_RESETHAND | SA_RESTART);
    sigaction(SIGINT, &action, nullptr);
    sigaction(SIGTERM, &action, nullptr);
    sigaction(SIGHUP, &action, nullptr);
}

bool interrupted() {
    return signal_came != 0;
}

}  // namespace microbatch::cli
