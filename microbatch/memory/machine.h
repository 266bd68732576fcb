#pragma once

#include <cstdint>

namespace microbatch {

/// Bytes that a process can still allocate without swapping: MemAvailable, or what is left of the container's limit if
/// that is less. If the system does not say: half of the physical memory. At least 1.
std::int64_t available_memory_bytes();

/// Bytes of physical memory.
std::int64_t physical_memory_bytes();

}  // namespace microbatch
