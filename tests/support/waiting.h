#pragma once

#include <sys/types.h>
#include <unistd.h>

#include <chrono>
#include <string>
#include <thread>

#include "support/temp_folder.h"

namespace microbatch::test {

/// Returns once the condition holds. False: after minutes it still does not, so something hangs.
template <class Condition>
bool comes_true(const Condition& condition) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::minutes(4);
    while (!condition()) {
        if (std::chrono::steady_clock::now() > end) return false;
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return true;
}

/// Whether a thread of this process sleeps, as one does that waits for another.
inline bool is_asleep(pid_t thread) {
    const std::string status = read_file("/proc/self/task/" + std::to_string(thread) + "/stat");
    return status.find(") S ") != std::string::npos;
}

}  // namespace microbatch::test
