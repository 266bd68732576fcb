#include "fake_device/memory.h"

#include <c10/core/CachingDeviceAllocator.h>
#include <c10/util/Exception.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "fake_device/fake_device.h"

namespace fake {
namespace {

constexpr std::size_t space = std::size_t{64} << 30;  // of addresses; memory is taken when it is written
constexpr std::size_t whole = std::size_t{1} << 30;   // the device's memory
constexpr std::size_t rounding = 512;                 // as other devices do
constexpr auto all = static_cast<std::size_t>(c10::CachingAllocator::StatType::AGGREGATE);

// The same pages twice: where nobody may touch them, and where kernels do.
struct Pages {
    Pages() {
        const int file = memfd_create("fake_device", MFD_CLOEXEC);
        TORCH_CHECK(file >= 0 && ftruncate(file, space) == 0, "no memory for the fake device");
        closed = static_cast<char*>(mmap(nullptr, space, PROT_NONE, MAP_SHARED | MAP_NORESERVE, file, 0));
        open = static_cast<char*>(mmap(nullptr, space, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file, 0));
        TORCH_CHECK(closed != MAP_FAILED && open != MAP_FAILED, "no addresses for the fake device");
        close(file);
    }
    char *closed, *open;
};

const Pages& pages() {
    static const Pages all_pages;
    return all_pages;
}

/// Keeps what is freed for the next allocation of the same size, as other devices' allocators keep segments.
class Allocator final : public c10::DeviceAllocator {
public:
    c10::DataPtr allocate(std::size_t size) override {
        void* pointer = size == 0 ? nullptr : take((size + rounding - 1) / rounding * rounding);
        return {pointer, pointer, &release, device()};
    }
    c10::DeleterFnPtr raw_deleter() const override { return &release; }
    void copy_data(void* target, const void* source, std::size_t size) const override {
        std::memcpy(behind(target), behind(source), size);
    }
    bool initialized() override { return true; }
    void emptyCache(c10::MempoolId_t) override {
        const std::lock_guard lock(mutex_);
        empty_cache();
    }
    void recordStream(const c10::DataPtr&, c10::Stream) override {}
    c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override {
        const std::lock_guard lock(mutex_);
        return statistics_;
    }
    void resetAccumulatedStats(c10::DeviceIndex) override {}
    void resetPeakStats(c10::DeviceIndex) override {
        const std::lock_guard lock(mutex_);
        statistics_.allocated_bytes[all].reset_peak();
        statistics_.reserved_bytes[all].reset_peak();
    }
    std::pair<std::size_t, std::size_t> getMemoryInfo(c10::DeviceIndex) override {
        const std::lock_guard lock(mutex_);
        const std::size_t reserved = static_cast<std::size_t>(statistics_.reserved_bytes[all].current);
        return {whole - std::min(whole, reserved), whole};
    }

    void set_limit(std::size_t bytes) {
        const std::lock_guard lock(mutex_);
        limit_ = bytes;
    }
    std::size_t limit() {
        const std::lock_guard lock(mutex_);
        return limit_;
    }
    void fail(std::int64_t n) {
        const std::lock_guard lock(mutex_);
        fails_ = n > 0 ? count_ + n : 0;
    }
    std::int64_t count() {
        const std::lock_guard lock(mutex_);
        return count_;
    }

private:
    static void release(void* pointer);

    void* take(std::size_t size) {
        std::unique_lock lock(mutex_);
        ++count_;
        if (count_ == fails_) refuse(size, lock);
        std::vector<std::size_t>& cached = cache_[size];
        std::size_t place = 0;
        if (!cached.empty()) {
            place = cached.back();
            cached.pop_back();
        } else {
            auto& reserved = statistics_.reserved_bytes[all];
            if (static_cast<std::size_t>(reserved.current) + size > limit_) empty_cache();
            if (static_cast<std::size_t>(reserved.current) + size > limit_) refuse(size, lock);
            reserved.increase(size);
            place = place_for(size);
        }
        statistics_.allocated_bytes[all].increase(size);
        void* const pointer = pages().closed + place;
        sizes_[place] = size;
        report(pointer, static_cast<std::int64_t>(size), lock);
        return pointer;
    }

    [[noreturn]] void refuse(std::size_t size, std::unique_lock<std::mutex>& lock) {
        ++statistics_.num_ooms;
        const std::size_t limit = limit_;
        const auto allocated = statistics_.allocated_bytes[all].current;
        lock.unlock();
        TORCH_CHECK_WITH(OutOfMemoryError, false, "fake out of memory. Tried to allocate ", size, " bytes; ", allocated,
                         " of ", limit, " are allocated");
        throw;
    }

    void give_back(void* pointer) {
        std::unique_lock lock(mutex_);
        const std::size_t place = static_cast<std::size_t>(static_cast<char*>(pointer) - pages().closed);
        const std::size_t size = sizes_.extract(place).mapped();
        statistics_.allocated_bytes[all].decrease(size);
        cache_[size].push_back(place);
        // What is used after it was freed is seen: not a number.
        std::memset(pages().open + place, 0xff, size);
        report(pointer, -static_cast<std::int64_t>(size), lock);
    }

    // Outside the lock: who listens may ask for statistics.
    void report(void* pointer, std::int64_t size, std::unique_lock<std::mutex>& lock) {
        const auto allocated = static_cast<std::size_t>(statistics_.allocated_bytes[all].current);
        const auto reserved = static_cast<std::size_t>(statistics_.reserved_bytes[all].current);
        lock.unlock();
        c10::reportMemoryUsageToProfiler(pointer, size, allocated, reserved, device());
    }

    std::size_t place_for(std::size_t size) {
        for (auto hole = holes_.begin(); hole != holes_.end(); ++hole) {
            if (hole->second < size) continue;
            const auto [place, length] = *hole;
            holes_.erase(hole);
            if (length > size) holes_.emplace(place + size, length - size);
            return place;
        }
        TORCH_CHECK(end_ + size <= space, "the fake device has no addresses left");
        return std::exchange(end_, end_ + size);
    }

    void empty_cache() {
        for (auto& [size, places] : cache_) {
            for (const std::size_t place : places) {
                statistics_.reserved_bytes[all].decrease(size);
                add_hole(place, size);
            }
            places.clear();
        }
    }

    void add_hole(std::size_t place, std::size_t size) {
        auto next = holes_.lower_bound(place);
        if (next != holes_.end() && place + size == next->first) {
            size += next->second;
            next = holes_.erase(next);
        }
        if (next != holes_.begin()) {
            const auto before = std::prev(next);
            if (before->first + before->second == place) {
                before->second += size;
                return;
            }
        }
        holes_.emplace(place, size);
    }

    std::mutex mutex_;
    std::map<std::size_t, std::size_t> sizes_;               // of what is allocated, by place
    std::map<std::size_t, std::vector<std::size_t>> cache_;  // places by size
    std::map<std::size_t, std::size_t> holes_;
    std::size_t end_ = 0, limit_ = whole;
    std::int64_t count_ = 0, fails_ = 0;
    c10::CachingDeviceAllocator::DeviceStats statistics_;
};

// Never destroyed: tensors may have static lifetime.
Allocator& the_allocator() {
    static auto& one = *new Allocator;
    return one;
}

void Allocator::release(void* pointer) {
    if (pointer != nullptr) the_allocator().give_back(pointer);
}

/// Pinned memory: the host's, of which it is known where it is.
class PinnedAllocator final : public c10::Allocator {
public:
    c10::DataPtr allocate(std::size_t size) override {
        void* pointer = size == 0 ? nullptr : std::aligned_alloc(64, (size + 63) / 64 * 64);
        if (pointer != nullptr) {
            const std::lock_guard lock(mutex_);
            blocks_[static_cast<char*>(pointer)] = size;
        }
        return {pointer, pointer, &release, c10::Device(c10::kCPU)};
    }
    c10::DeleterFnPtr raw_deleter() const override { return &release; }
    void copy_data(void* target, const void* source, std::size_t size) const override {
        std::memcpy(target, source, size);
    }

    bool has(const void* pointer) {
        const std::lock_guard lock(mutex_);
        const auto after = blocks_.upper_bound(static_cast<const char*>(pointer));
        if (after == blocks_.begin()) return false;
        const auto& [begin, size] = *std::prev(after);
        return static_cast<const char*>(pointer) < begin + size;
    }

private:
    static void release(void* pointer);

    std::mutex mutex_;
    std::map<const char*, std::size_t, std::less<>> blocks_;
};

PinnedAllocator& the_pinned() {
    static auto& one = *new PinnedAllocator;
    return one;
}

void PinnedAllocator::release(void* pointer) {
    if (pointer == nullptr) return;
    {
        const std::lock_guard lock(the_pinned().mutex_);
        the_pinned().blocks_.erase(static_cast<const char*>(pointer));
    }
    std::free(pointer);
}

}  // namespace

c10::DeviceAllocator& allocator() {
    return the_allocator();
}
c10::Allocator& pinned_allocator() {
    return the_pinned();
}
bool is_pinned(const void* pointer) {
    return the_pinned().has(pointer);
}

void* behind(const void* pointer) {
    const Pages& both = pages();
    return pointer == nullptr ? nullptr : both.open + (static_cast<const char*>(pointer) - both.closed);
}

void set_memory(std::int64_t bytes) {
    the_allocator().set_limit(static_cast<std::size_t>(bytes));
}
std::int64_t memory() {
    return static_cast<std::int64_t>(the_allocator().limit());
}
void fail_allocation(std::int64_t n) {
    the_allocator().fail(n);
}
std::int64_t allocations() {
    return the_allocator().count();
}

}  // namespace fake
