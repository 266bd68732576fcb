#include "cli/machine.h"

#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <optional>
#include <string>

namespace microbatch::cli {
namespace {

std::optional<std::int64_t> number_in(const char* path) {
    std::ifstream file(path);
    std::int64_t number = 0;
    if (file >> number) return number;
    return std::nullopt;
}

// What is left of the control group's limit; "max" means that there is none.
std::optional<std::int64_t> control_group_bytes() {
    const auto limit = number_in("/sys/fs/cgroup/memory.max");
    const auto used = number_in("/sys/fs/cgroup/memory.current");
    if (!limit || !used) return std::nullopt;
    return std::max<std::int64_t>(0, *limit - *used);
}

std::optional<std::int64_t> mem_available() {
    std::ifstream file("/proc/meminfo");
    std::string key, unit;
    std::int64_t kibibytes = 0;
    while (file >> key >> kibibytes) {
        if (key == "MemAvailable:") return kibibytes * 1024;
        std::getline(file, unit);
    }
    return std::nullopt;
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

}  // namespace microbatch::cli
