#pragma once

#include <cstdint>
#include <limits>

namespace microbatch {

/// Bytes of CPU tensors: what is allocated now, and the most there has been since the last reset_peak_memory().
/// Counts what was asked for: no allocator rounding, no cached blocks, nothing but tensors and torch's scratch.
struct MemoryUse {
    std::int64_t live_bytes = 0;
    std::int64_t peak_bytes = 0;
};

inline constexpr std::int64_t no_budget = std::numeric_limits<std::int64_t>::max();

/// Counts every CPU tensor of the process from now on, and lets a budget be set. Tensors made before are not counted.
/// A second call does nothing. Threads: any.
void install_budget_allocator();

/// Live and peak bytes; zeros before install_budget_allocator(). Threads: any.
MemoryUse memory_use();

/// The peak begins again at what is live now. Threads: any.
void reset_peak_memory();

/// An allocation that would take the live bytes above `bytes` throws c10::OutOfMemoryError instead. Returns the budget
/// before. What is allocated already stays, even above the budget. Threads: any.
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

}  // namespace microbatch
