#pragma once

#include <c10/core/Device.h>

#include <cstdint>

/// An accelerator for the tests: the device "fake" (PrivateUse1), one of it, whose memory is the host's, but which the host
/// cannot touch: a tensor's pointer is into pages without access, and only the device's kernels know the second address
/// at which the same memory can be read. A pointer taken on the host ends the process at the first byte.
///
/// Kernels: torch's for the CPU, so results have the bits of the CPU. Backward runs on a thread of its own, as on any
/// accelerator. A copy from pinned memory that need not block happens when the next kernel starts, so whoever changes the
/// source too early is found; one into pinned memory, at the next wait: until then it holds only ones, NaN as a float.
namespace fake {

/// Waits of the host for the device since reset_counts().
struct Counts {
    std::int64_t scalars = 0;    ///< item() and other numbers read, and shapes that depend on values
    std::int64_t downloads = 0;  ///< tensors copied to the host
    std::int64_t uploads = 0;    ///< tensors copied to the device, the host waiting or not
    std::int64_t blocking_uploads = 0;
    std::int64_t host_reads() const { return scalars + downloads; }
};

c10::Device device();
Counts counts();
void reset_counts();

/// The limit of the device's allocator in bytes, at first its memory, 1 GiB. Beyond it, allocations throw
/// c10::OutOfMemoryError once nothing that is cached is left to free.
void set_memory(std::int64_t bytes);
std::int64_t memory();

/// The allocations from now on: the n-th from now on, 1 the next, fails once. 0: none.
void fail_allocation(std::int64_t n);
/// Allocations since the process began.
std::int64_t allocations();

}  // namespace fake

// For Python, which has no other way to them.
extern "C" {
void fake_seed(std::uint64_t seed);
/// The state of the device's generator: 5,056 bytes.
void fake_get_generator_state(void* to);
void fake_set_generator_state(const void* from);
void fake_set_memory(std::int64_t bytes);
std::int64_t fake_memory();
void fake_fail_allocation(std::int64_t n);
std::int64_t fake_allocations();
void fake_reset_counts();
std::int64_t fake_host_reads();
std::int64_t fake_blocking_uploads();
}
