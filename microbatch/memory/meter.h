#pragma once

#include <c10/core/Device.h>

#include <cstdint>
#include <functional>
#include <string>

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

    /// Bytes that this process can still take: what is free, and what is cached.
    virtual std::int64_t available() const = 0;

    /// In bytes; if it was never set, no_budget on the CPU and the memory of any other device, if known.
    virtual std::int64_t budget() const = 0;

    /// False if it was never set, or set to no_budget.
    virtual bool has_budget() const = 0;

    /// Errors: ErrorKind::usage if `bytes` is not above 0.
    virtual void set_budget(std::int64_t bytes) = 0;

    /// True if an allocation beyond the budget throws: on the CPU, and on a device whose allocator took it as its limit
    /// (see set_device_limiter()). False if only the device's memory is a limit; the caller must then compare the budget
    /// with use().
    virtual bool enforces() const = 0;

    virtual at::Device device() const = 0;
};

/// Makes a budget of a device, in bytes, the limit of its allocator; no_budget lifts it. Returns false if the allocator
/// has no such limit.
using DeviceLimiter = std::function<bool(at::Device device, std::int64_t bytes)>;

/// What later budgets of devices go through, from now on; none at first. torch has no function for it in C++ that does
/// without the headers of a device (2.11 to 2.14): Python's package sets one, by set_per_process_memory_fraction().
void set_device_limiter(DeviceLimiter limiter);

/// The device's own budget is compared to its memory here, so that a budget beyond it is refused when it is stated.
/// Errors: ErrorKind::usage, naming both, if the device has less.
void require_budget_fits(const Meter& meter, std::int64_t bytes);

/// Why an allocation may fail although its size is free: ", and 3 GiB of the 10 GiB that the device has reserved are in
/// pieces between tensors (...)". Empty if less than a tenth is.
std::string fragmentation_of(at::Device device);

/// Of a device's meter. Of the CPU without installing the budget allocator: see memory_use(). Where nothing is measured:
/// zeros, and nothing.
MemoryUse memory_use_of(at::Device device);
void reset_peak_of(at::Device device);
void release_cached_of(at::Device device);

/// Bytes that this process can still take on a device. Of the CPU without installing the budget allocator.
/// Errors: as meter_of().
std::int64_t available_of(at::Device device);

/// The meter of a device: one per device, for the lifetime of the process. The CPU's meter installs the budget
/// allocator. A device without an index is the first of its kind.
/// Errors: ErrorKind::usage, naming the device, if it does not exist or its allocator keeps no statistics.
/// Threads: any.
Meter& meter_of(at::Device device);

}  // namespace microbatch
