#pragma once

#include <c10/core/Device.h>

#include <cstdint>

#include "microbatch/memory/budget_allocator.h"

namespace microbatch {

/// What tensors take of one device, and what they may take. Threads: any.
class Meter {
public:
    virtual ~Meter() = default;

    /// On the CPU what was asked for, to the byte; elsewhere as the device's allocator counts.
    virtual MemoryUse use() const = 0;

    virtual void reset_peak() = 0;

    /// Gives cached blocks back to the system.
    virtual void release_cached() = 0;

    /// In bytes; as long as none was set, no_budget on the CPU and the memory of any other device where it is known.
    virtual std::int64_t budget() const = 0;

    /// Errors: ErrorKind::usage if `bytes` is not above 0.
    virtual void set_budget(std::int64_t bytes) = 0;

    /// True: an allocation beyond the budget throws. False: only the device's own limit throws, and who keeps to the
    /// budget compares it with use().
    virtual bool enforces() const = 0;

    virtual at::Device device() const = 0;
};

/// The meter of a device: one each, for as long as the process lives. That of the CPU installs the budget allocator. A
/// device without an index is the first of its kind.
/// Errors: ErrorKind::usage, naming the device, if its allocator keeps no statistics.
/// Threads: any.
Meter& meter_of(at::Device device);

}  // namespace microbatch
