#include "microbatch/memory/budget_allocator.h"

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/util/Exception.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <utility>

#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"
#include "microbatch/core/units.h"
#include "microbatch/memory/block_cache.h"

namespace microbatch {
namespace {

/// The allocator's accounts, behind one lock: a refused request in one thread must not affect another thread's, and the
/// process must never exceed the budget, even for a moment. When memory is reused, the lock is held for some
/// nanoseconds.
struct Books {
    std::mutex mutex;
    BlockCache cache;
    std::int64_t live = 0;
    std::int64_t peak = 0;
    std::int64_t highest = 0;  // peak of the live bytes since release_cached_memory(), whatever reset the peak
    std::int64_t budget = no_budget;
    std::int64_t allocations = 0;
    std::int64_t fail_in = 0;  // this many allocations from now; 0 means never

    // The limit for all blocks, including cached ones. This much above the peak of the live bytes is enough for
    // rounding and fragmentation, also for a small job with a few large tensors.
    std::int64_t allowed() const { return std::min(budget, highest + highest / 16 + (std::int64_t{1} << 20)); }
};

// Never destroyed: tensors with static lifetime may be freed after any destructor here.
constinit Books books;
constinit std::atomic<bool> installed = false;

enum class Refusal { none, budget, system, rehearsed };

/// The answer to a request for memory, with the figures at that moment.
struct Answer {
    Block* block = nullptr;
    Refusal refusal = Refusal::none;
    std::int64_t live = 0;
    std::int64_t cached = 0;
    std::int64_t budget = 0;
};

bool fits_budget(std::size_t bytes) {
    return books.live <= books.budget && bytes <= static_cast<std::uint64_t>(books.budget - books.live);
}

/// Counts a request, and decides whether to refuse it.
Refusal judge(std::size_t bytes) {
    ++books.allocations;
    if (books.fail_in > 0 && --books.fail_in == 0) return Refusal::rehearsed;
    return fits_budget(bytes) ? Refusal::none : Refusal::budget;
}

Refusal take(std::size_t bytes, Block*& block) {
    if (const Refusal refusal = judge(bytes); refusal != Refusal::none) return refusal;
    if (bytes > largest_block_bytes) return Refusal::system;
    const std::int64_t live = books.live + static_cast<std::int64_t>(bytes);
    const std::int64_t highest_before = books.highest;
    books.highest = std::max(books.highest, live);
    block = books.cache.reuse(bytes);
    if (block == nullptr) block = books.cache.add(bytes, books.allowed());
    if (block == nullptr) {
        books.highest = highest_before;
        return Refusal::system;
    }
    books.live = live;
    books.peak = std::max(books.peak, live);
    return Refusal::none;
}

Answer answer_as_it_stands(Refusal refusal, Block* block) {
    return {.block = block,
            .refusal = refusal,
            .live = books.live,
            .cached = books.cache.cached_bytes(),
            .budget = books.budget};
}

Answer request(std::size_t bytes) {
    const std::lock_guard lock(books.mutex);
    Block* block = nullptr;
    const Refusal refusal = take(bytes, block);
    return answer_as_it_stands(refusal, block);
}

Answer request_for_a_moment(std::size_t bytes) {
    const std::lock_guard lock(books.mutex);
    const Refusal refusal = judge(bytes);
    if (refusal == Refusal::none) books.peak = std::max(books.peak, books.live + static_cast<std::int64_t>(bytes));
    return answer_as_it_stands(refusal, nullptr);
}

[[noreturn]] void refuse(const char* what, std::size_t bytes, const Answer& answer) {
    const auto size = static_cast<std::int64_t>(std::min<std::size_t>(bytes, no_budget));
    c10::reportOutOfMemoryToProfiler(size, static_cast<std::size_t>(answer.live),
                                     static_cast<std::size_t>(answer.live + answer.cached), at::kCPU);
    TORCH_CHECK_WITH(OutOfMemoryError, answer.refusal != Refusal::rehearsed, what, " of ", format_bytes(size),
                     " is refused because of fail_allocation()");
    TORCH_CHECK_WITH(OutOfMemoryError, answer.refusal != Refusal::system, "the machine has no ", format_bytes(size),
                     " left for ", what, "; ", format_bytes(answer.live), " are in use");
    TORCH_CHECK_WITH(OutOfMemoryError, false, what, " of ", format_bytes(size),
                     " does not fit: ", format_bytes(answer.live), " of the memory budget of ",
                     format_bytes(answer.budget), " are in use");
}

void tell_profiler(void* data, std::int64_t bytes, std::int64_t live, std::int64_t cached) {
    if (!c10::memoryProfilingEnabled()) return;
    c10::reportMemoryUsageToProfiler(data, bytes, static_cast<std::size_t>(live),
                                     static_cast<std::size_t>(live + cached), at::kCPU);
}

void release(void* data) {
    if (data == nullptr) return;
    Block* block = block_of(data);
    // oneDNN uses the current allocator to free what it took from the previous one.
    if (block == nullptr) return c10::free_cpu(data);
    const std::int64_t bytes = block->asked_bytes;
    std::int64_t live = 0, cached = 0;
    {
        const std::lock_guard lock(books.mutex);
        books.live -= bytes;
        books.cache.keep(block);
        // Only if the budget was set below the live bytes: freed blocks are then not cached.
        if (books.cache.held_bytes() > books.budget) books.cache.shrink(books.budget);
        live = books.live;
        cached = books.cache.cached_bytes();
    }
    tell_profiler(data, -bytes, live, cached);
}

class BudgetAllocator final : public c10::Allocator {
public:
    c10::DataPtr allocate(std::size_t bytes) override {
        const at::Device cpu(at::kCPU);
        if (bytes == 0) return {nullptr, nullptr, &release, cpu};
        const Answer answer = request(bytes);
        if (answer.refusal != Refusal::none) refuse("a tensor", bytes, answer);
        void* data = data_of(answer.block);
        tell_profiler(data, static_cast<std::int64_t>(bytes), answer.live, answer.cached);
        return {data, data, &release, cpu};
    }

    c10::DeleterFnPtr raw_deleter() const override { return &release; }

    void copy_data(void* target, const void* source, std::size_t bytes) const override {
        default_copy_data(target, source, bytes);
    }
};

}  // namespace

void expect_memory(std::int64_t bytes) {
    if (bytes <= 0 || !installed.load(std::memory_order_relaxed)) return;
    const auto size = static_cast<std::size_t>(bytes);
    const Answer answer = request_for_a_moment(size);
    if (answer.refusal != Refusal::none) refuse("the working memory of an operation", size, answer);
    tell_profiler(nullptr, bytes, answer.live + bytes, answer.cached);
    tell_profiler(nullptr, -bytes, answer.live, answer.cached);
}

void install_budget_allocator() {
    // Never destroyed, like the accounts.
    static auto* allocator = [] {
        auto* made = new BudgetAllocator;
        // A fork in another thread must not leave the child with a lock that is never released.
        ::pthread_atfork([] { books.mutex.lock(); }, [] { books.mutex.unlock(); }, [] { books.mutex.unlock(); });
        c10::SetCPUAllocator(made, /*priority=*/10);
        installed = true;
        return made;
    }();
    (void)allocator;
}

MemoryUse memory_use() {
    const std::lock_guard lock(books.mutex);
    return {books.live, books.peak, books.cache.cached_bytes()};
}

void release_cached_memory() {
    const std::lock_guard lock(books.mutex);
    books.cache.shrink(0);
    books.highest = books.live;
}

void reset_peak_memory() {
    const std::lock_guard lock(books.mutex);
    books.peak = books.live;
}

std::int64_t set_memory_budget(std::int64_t bytes) {
    if (bytes <= 0)
        throw Error(ErrorKind::usage, str_cat("the memory budget is ", bytes, " bytes; it must be above 0"));
    const std::lock_guard lock(books.mutex);
    books.cache.shrink(bytes);
    return std::exchange(books.budget, bytes);
}

std::int64_t memory_budget() {
    const std::lock_guard lock(books.mutex);
    return books.budget;
}

void fail_allocation(std::int64_t countdown) {
    if (countdown < 0) {
        throw Error(ErrorKind::usage, str_cat("allocation ", countdown, " from now cannot fail; the next one is 1"));
    }
    const std::lock_guard lock(books.mutex);
    books.fail_in = countdown;
}

std::int64_t allocation_count() {
    const std::lock_guard lock(books.mutex);
    return books.allocations;
}

}  // namespace microbatch
