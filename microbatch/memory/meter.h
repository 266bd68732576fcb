#pragma once

#include <c10/core/Device.h>

#include <cstdint>

#include "microbatch/memory/budget_allocator.h"

namespace microbatch {

/// The memory use of tensors on one device, and their budget. Threads: any.
class Meter {
public:
    virtual ~Meter() = default;

    /// On the CPU, the requested bytes; on other devices, as the device's allocator counts.
    virtual MemoryUse use() const = 0;

    virtual void reset_peak() = 0;

    /// Returns cached blocks to the system.
    virtual void release_cached() = 0;

    /// In bytes; if it was never set, no_budget on the CPU and the memory of any other device, if known.
    virtual std::int64_t budget() const = 0;

    /// Errors: ErrorKind::usage if `bytes` is not above 0.
    virtual void set_budget(std::int64_t bytes) = 0;

    /// True if an allocation beyond the budget throws. False if only the device's own limit throws; the caller must
    /// then compare the budget with use().
    virtual bool enforces() const = 0;

    virtual at::Device device() const = 0;
};

/// The meter of a device: one per device, for the lifetime of the process. The CPU's meter installs the budget
/// allocator. A device without an index is the first of its kind.
/// Errors: ErrorKind::usage, naming the device, if its allocator keeps no statistics.
/// Threads: any.
Meter& meter_of(at::Device device);

}  // namespace microbatch
