// The budget allocator for a Python process that has already imported torch: late_install.py loads this with ctypes.
#include <cstdint>

#include "microbatch/memory/budget_allocator.h"

extern "C" {
void install() {
    microbatch::install_budget_allocator();
}
std::int64_t live() {
    return microbatch::memory_use().live_bytes;
}
std::int64_t peak() {
    return microbatch::memory_use().peak_bytes;
}
void reset_peak() {
    microbatch::reset_peak_memory();
}
void set_budget(std::int64_t bytes) {
    microbatch::set_memory_budget(bytes);
}
}
