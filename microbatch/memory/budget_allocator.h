#pragma once

#include <cstdint>
#include <limits>

namespace microbatch {

/// Bytes of a device's tensors: what is allocated now, and the most since the last reset of the peak. On the CPU, both
/// count the requested bytes, without rounding: only tensors and torch's scratch memory.
struct MemoryUse {
    std::int64_t live_bytes = 0;
    std::int64_t peak_bytes = 0;
    std::int64_t cached_bytes = 0;  ///< freed blocks kept for reuse; not in live_bytes
    /// The most that a device's allocator had taken from it, its rounding and what lay between tensors included. 0 on
    /// the CPU, where freed blocks go back before the budget is exceeded.
    std::int64_t peak_reserved_bytes = 0;
};

inline constexpr std::int64_t no_budget = std::numeric_limits<std::int64_t>::max();

/// From now on, counts every CPU tensor of the process, allows a budget, and reuses freed memory: a training step like
/// the previous one requests almost nothing from the system. Tensors that already exist are not counted; their own
/// allocator frees them. A second call does nothing.
///
/// Before requesting memory from the system, freed blocks are returned to it until all blocks together are within the
/// budget, and exceed the peak of the live bytes since the last release_cached_memory() by at most a sixteenth plus 1
/// MiB.
///
/// Threads: any. A child of fork() may continue to allocate.
/// Cost:    less than torch's own allocator; tens of nanoseconds for a block that is reused.
void install_budget_allocator();

/// Live, peak and cached bytes; zeros before install_budget_allocator(). Threads: any.
MemoryUse memory_use();

/// Returns every cached block to the system: useful if less memory is needed from now on. Threads: any.
void release_cached_memory();

/// Resets the peak to the live bytes. Threads: any.
void reset_peak_memory();

/// From now on, an allocation that would raise the live bytes above `bytes` throws c10::OutOfMemoryError. Returns the
/// previous budget. Existing allocations stay, even above the budget. Threads: any.
/// State:  cached blocks that exceed the new budget are freed immediately.
/// Errors: ErrorKind::usage if `bytes` is not above 0.
std::int64_t set_memory_budget(std::int64_t bytes);

/// The budget in bytes, or no_budget. Threads: any.
std::int64_t memory_budget();

/// Sets another budget for the lifetime of this object, then restores the previous one.
class BudgetScope {
public:
    explicit BudgetScope(std::int64_t bytes) : before_(set_memory_budget(bytes)) {}
    BudgetScope(const BudgetScope&) = delete;
    BudgetScope& operator=(const BudgetScope&) = delete;
    ~BudgetScope() { set_memory_budget(before_); }

private:
    std::int64_t before_;
};

/// Counts `bytes` towards the peak as if they were allocated and immediately freed, and throws as an allocation would.
/// To be called before threads share work, whose own peak depends on how they interleave: with a bound on what they can
/// hold together, the peak is the same every time, and if memory runs out, it does so before the work starts. A
/// MemoryTrace records it as an allocation and a release. Does nothing before install_budget_allocator().
/// Errors: c10::OutOfMemoryError.
/// Threads: any.
void expect_memory(std::int64_t bytes);

/// Simulates running out of memory: the `countdown`-th CPU allocation from now, in any thread (1 is the next), throws
/// c10::OutOfMemoryError once, as if the budget were exhausted. 0 cancels it. Requires install_budget_allocator().
///
///     const std::int64_t before = allocation_count();
///     step();
///     for (std::int64_t n = allocation_count() - before; n > 0; --n) { fail_allocation(n); /* step() must recover */ }
///
/// Errors: ErrorKind::usage if `countdown` is below 0.
/// Threads: any.
void fail_allocation(std::int64_t countdown);

/// The number of CPU allocations since install_budget_allocator(), including refused ones but not those of 0 bytes.
/// Threads: any.
std::int64_t allocation_count();

}  // namespace microbatch
