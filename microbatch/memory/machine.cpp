#include "microbatch/memory/machine.h"

#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <optional>
#include <string>
#include <string_view>

namespace microbatch {
namespace {

std::optional<std::int64_t> number_in(const char* path) {
    std::ifstream file(path);
    std::int64_t number = 0;
    if (file >> number) return number;
    return std::nullopt;
}

/// The number after `key` in a file of lines "key number ...".
std::optional<std::int64_t> number_after(std::string_view key, const char* path) {
    std::ifstream file(path);
    std::string word, rest;
    std::int64_t number = 0;
    while (file >> word >> number) {
        if (word == key) return number;
        std::getline(file, rest);
    }
    return std::nullopt;
}

// What is left of the control group's limit; "max" means no limit. Cached pages of files count as used there,
// but the system frees them when memory is needed.
std::optional<std::int64_t> control_group_bytes() {
    const auto limit = number_in("/sys/fs/cgroup/memory.max");
    const auto used = number_in("/sys/fs/cgroup/memory.current");
    if (!limit || !used) return std::nullopt;
    const char* const statistics = "/sys/fs/cgroup/memory.stat";
    const std::int64_t cached =
        number_after("active_file", statistics).value_or(0) + number_after("inactive_file", statistics).value_or(0);
    return *limit - *used + cached;
}

std::optional<std::int64_t> mem_available() {
    const auto kibibytes = number_after("MemAvailable:", "/proc/meminfo");
    if (!kibibytes) return std::nullopt;
    return *kibibytes * 1024;
}

}  // namespace

std::int64_t physical_memory_bytes() {
    return static_cast<std::int64_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<std::int64_t>(sysconf(_SC_PAGE_SIZE));
}

std::int64_t available_memory_bytes() {
    std::int64_t available = mem_available().value_or(physical_memory_bytes() / 2);
    if (const auto left = control_group_bytes()) available = std::min(available, *left);
    return std::max<std::int64_t>(available, 1);
}

}  // namespace microbatch
