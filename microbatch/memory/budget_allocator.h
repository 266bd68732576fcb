#pragma once

#include <cstdint>
#include <limits>

namespace microbatch {

/// Bytes of a device's tensors: what is allocated now, and the most there has been since the last reset of the peak.
/// On the CPU both count what was asked for: no allocator rounding, nothing but tensors and torch's scratch.
struct MemoryUse {
    std::int64_t live_bytes = 0;
    std::int64_t peak_bytes = 0;
    std::int64_t cached_bytes = 0;  ///< freed blocks kept for reuse; not in live_bytes
};

inline constexpr std::int64_t no_budget = std::numeric_limits<std::int64_t>::max();

/// Counts every CPU tensor of the process from now on, lets a budget be set, and reuses memory that was freed: a
/// training step like the one before takes next to nothing from the system. Tensors made before are not counted; the
/// allocator that made them frees them. A second call does nothing.
///
/// Before memory is taken from the system, freed blocks are given back to it until all blocks together are within the
/// budget and within a sixteenth (and 1 MiB) of the most that was live at once since the last release_cached_memory().
///
/// Threads: any. A child of fork() may go on allocating.
/// Cost:    less than torch's own allocator; tens of nanoseconds for a block that is reused.
void install_budget_allocator();

/// Live, peak and cached bytes; zeros before install_budget_allocator(). Threads: any.
MemoryUse memory_use();

/// Gives every cached block back to the system: worth it where less memory will be needed than before. Threads: any.
void release_cached_memory();

/// The peak begins again at what is live now. Threads: any.
void reset_peak_memory();

/// An allocation that would take the live bytes above `bytes` throws c10::OutOfMemoryError instead. Returns the budget
/// before. What is allocated already stays, even above the budget. Threads: any.
/// State:  cached blocks that do not fit the new budget are given back at once.
/// Errors: ErrorKind::usage if `bytes` is not above 0.
std::int64_t set_memory_budget(std::int64_t bytes);

/// The budget in bytes, or no_budget. Threads: any.
std::int64_t memory_budget();

/// Another budget for as long as this lives; the one before comes back after.
class BudgetScope {
public:
    explicit BudgetScope(std::int64_t bytes) : before_(set_memory_budget(bytes)) {}
    BudgetScope(const BudgetScope&) = delete;
    BudgetScope& operator=(const BudgetScope&) = delete;
    ~BudgetScope() { set_memory_budget(before_); }

private:
    std::int64_t before_;
};

/// Counts `bytes` towards the peak as if they were allocated now and freed at once, and refuses as an allocation would:
/// before work that threads share, whose own peak depends on how they meet. With a bound on what they can hold together
/// the peak is the same every time, and memory runs out before the work begins, if at all. A MemoryTrace has it as an
/// allocation and a release. Does nothing before install_budget_allocator().
/// Errors: c10::OutOfMemoryError.
/// Threads: any.
void expect_memory(std::int64_t bytes);

/// Rehearses running out of memory: the `countdown`-th CPU allocation from now, 1 being the next, of any thread, throws
/// c10::OutOfMemoryError, once, as if the budget were used up. 0 calls it off. Only install_budget_allocator() counts.
///
///     const std::int64_t before = allocation_count();
///     step();
///     for (std::int64_t n = allocation_count() - before; n > 0; --n) { fail_allocation(n); /* step() must recover */ }
///
/// Errors: ErrorKind::usage if `countdown` is below 0.
/// Threads: any.
void fail_allocation(std::int64_t countdown);

/// CPU allocations since install_budget_allocator(), refused ones included and those of 0 bytes not. Threads: any.
std::int64_t allocation_count();

}  // namespace microbatch
