#pragma once

#include <ATen/ops/empty.h>

#include <cstdint>

#include "fake_device/fake_device.h"
#include "microbatch/memory/budget_allocator.h"
#include "microbatch/memory/meter.h"

/// The memory of the device that the test runs on, by the names that the CPU's has: see test_device.cpp.
namespace microbatch::test {

inline at::Device device() {
    return at::empty({0}).device();
}

inline bool on_fake_device() {
    return device() == fake::device();
}

inline MemoryUse memory_use() {
    return meter_of(device()).use();
}

inline void reset_peak_memory() {
    meter_of(device()).reset_peak();
}

inline void fail_allocation(std::int64_t countdown) {
    on_fake_device() ? fake::fail_allocation(countdown) : microbatch::fail_allocation(countdown);
}

inline std::int64_t allocation_count() {
    return on_fake_device() ? fake::allocations() : microbatch::allocation_count();
}

/// While it lives, no more is live than this.
class BudgetScope {
public:
    explicit BudgetScope(std::int64_t bytes)
        : on_fake_(on_fake_device()), before_(on_fake_ ? fake::memory() : memory_budget()) {
        set(bytes);
    }
    BudgetScope(const BudgetScope&) = delete;
    BudgetScope& operator=(const BudgetScope&) = delete;
    ~BudgetScope() { set(before_); }

private:
    void set(std::int64_t bytes) const {
        on_fake_ ? fake::set_memory(bytes) : static_cast<void>(set_memory_budget(bytes));
    }

    bool on_fake_;
    std::int64_t before_;
};

}  // namespace microbatch::test
