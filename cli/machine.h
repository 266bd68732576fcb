#pragma once

#include <cstdint>

namespace microbatch::cli {

/// Bytes that a process can still take without swapping: MemAvailable, or the container's limit if that is lower.
/// Where the system does not say: half of the physical memory.
std::int64_t available_memory_bytes();

/// Bytes of physical memory.
std::int64_t physical_memory_bytes();

}  // namespace microbatch::cli
