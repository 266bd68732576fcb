// The budget allocator behind four C functions, for a Python process that has imported torch.
#include "microbatch/memory/budget_allocator.h"

extern "C" {
void microbatch_install() {
    microbatch::install_budget_allocator();
}
void microbatch_reset_peak() {
    microbatch::reset_peak_memory();
}
long long microbatch_peak() {
    return microbatch::memory_use().peak_bytes;
}
long long microbatch_live() {
    return microbatch::memory_use().live_bytes;
}
}
