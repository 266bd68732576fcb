#include "microbatch/memory/budget_allocator.h"

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstring>

#include "microbatch/core/error.h"
#include "microbatch/core/text.h"
#include "microbatch/core/units.h"

namespace microbatch {
namespace {

// The size stands in front of the data, one alignment unit wide, so that a block can be freed by its pointer alone.
constexpr std::size_t header_bytes = c10::gAlignment;
static_assert(header_bytes >= sizeof(std::int64_t));
constexpr std::size_t largest_block = std::numeric_limits<std::int64_t>::max() - header_bytes;

std::atomic<std::int64_t> live{0};
std::atomic<std::int64_t> peak{0};
std::atomic<std::int64_t> budget{no_budget};

void raise_peak(std::int64_t now) {
    std::int64_t before = peak.load(std::memory_order_relaxed);
    while (before < now && !peak.compare_exchange_weak(before, now, std::memory_order_relaxed)) {
    }
}

// Counts the bytes only if they fit, and returns what is live then: a request that is refused in one thread must not
// crowd out another's.
std::int64_t take(std::size_t bytes) {
    const std::int64_t allowed = budget.load(std::memory_order_relaxed);
    std::int64_t before = live.load(std::memory_order_relaxed);
    do {
        const bool fits = before <= allowed && bytes <= static_cast<std::uint64_t>(allowed - before);
        TORCH_CHECK_WITH(OutOfMemoryError, fits && bytes <= largest_block, "a tensor of ",
                         format_bytes(static_cast<std::int64_t>(std::min(bytes, largest_block))),
                         " does not fit: ", format_bytes(before), " of the memory budget of ", format_bytes(allowed),
                         " are in use");
    } while (!live.compare_exchange_weak(before, before + static_cast<std::int64_t>(bytes), std::memory_order_relaxed));
    return before + static_cast<std::int64_t>(bytes);
}

void give_back(std::int64_t bytes) {
    live.fetch_sub(bytes, std::memory_order_relaxed);
}

void release(void* data) {
    if (data == nullptr) return;
    char* block = static_cast<char*>(data) - header_bytes;
    std::int64_t size = 0;
    std::memcpy(&size, block, sizeof(size));
    give_back(size);
    c10::free_cpu(block);
}

class BudgetAllocator final : public c10::Allocator {
public:
    c10::DataPtr allocate(std::size_t bytes) override {
        const at::Device cpu(at::kCPU);
        if (bytes == 0) return {nullptr, nullptr, &release, cpu};
        const auto size = static_cast<std::int64_t>(bytes);
        const std::int64_t now = take(bytes);
        char* block = nullptr;
        try {
            block = static_cast<char*>(c10::alloc_cpu(bytes + header_bytes));
        } catch (const c10::Error&) {
            give_back(size);
            TORCH_CHECK_WITH(OutOfMemoryError, false, "the machine has no ", format_bytes(size), " left for a tensor; ",
                             format_bytes(now - size), " are in use");
        }
        raise_peak(now);
        std::memcpy(block, &size, sizeof(size));
        char* data = block + header_bytes;
        return {data, data, &release, cpu};
    }

    c10::DeleterFnPtr raw_deleter() const override { return &release; }

    void copy_data(void* target, const void* source, std::size_t bytes) const override {
        default_copy_data(target, source, bytes);
    }
};

}  // namespace

void install_budget_allocator() {
    // Never destroyed: tensors with static lifetime outlive every destructor that could be written here.
    static auto* allocator = [] {
        auto* made = new BudgetAllocator;
        c10::SetCPUAllocator(made, /*priority=*/10);
        return made;
    }();
    (void)allocator;
}

MemoryUse memory_use() {
    return {live.load(std::memory_order_relaxed), peak.load(std::memory_order_relaxed)};
}

void reset_peak_memory() {
    peak.store(live.load(std::memory_order_relaxed), std::memory_order_relaxed);
}

std::int64_t set_memory_budget(std::int64_t bytes) {
    if (bytes <= 0) throw Error(ErrorKind::usage, text("the memory budget is ", bytes, " bytes; it must be above 0"));
    return budget.exchange(bytes, std::memory_order_relaxed);
}

std::int64_t memory_budget() {
    return budget.load(std::memory_order_relaxed);
}

}  // namespace microbatch
