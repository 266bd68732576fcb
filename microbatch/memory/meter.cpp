#include "microbatch/memory/meter.h"

#include <c10/core/CachingDeviceAllocator.h>
#include <c10/util/Exception.h>

#include <atomic>
#include <map>
#include <memory>
#include <mutex>

#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"

namespace microbatch {
namespace {

class CpuMeter final : public Meter {
public:
    CpuMeter() { install_budget_allocator(); }

    MemoryUse use() const override { return memory_use(); }
    void reset_peak() override { reset_peak_memory(); }
    void release_cached() override { release_cached_memory(); }
    std::int64_t budget() const override { return memory_budget(); }
    void set_budget(std::int64_t bytes) override { set_memory_budget(bytes); }
    bool enforces() const override { return true; }
    at::Device device() const override { return at::kCPU; }
};

class DeviceMeter final : public Meter {
public:
    DeviceMeter(at::Device device, c10::DeviceAllocator* allocator) : device_(device), allocator_(allocator) {}

    MemoryUse use() const override {
        const auto statistics = allocator_->getDeviceStats(device_.index());
        constexpr auto all = static_cast<std::size_t>(c10::CachingAllocator::StatType::AGGREGATE);
        const auto& allocated = statistics.allocated_bytes[all];
        return {allocated.current, allocated.peak, statistics.reserved_bytes[all].current - allocated.current};
    }

    void reset_peak() override { allocator_->resetPeakStats(device_.index()); }
    void release_cached() override { allocator_->emptyCache(); }

    std::int64_t budget() const override {
        const std::int64_t set = budget_.load();
        return set > 0 ? set : device_bytes();
    }

    void set_budget(std::int64_t bytes) override {
        if (bytes <= 0) {
            throw Error(ErrorKind::usage, str_cat("the memory budget is ", bytes, " bytes; it must be above 0"));
        }
        budget_ = bytes;
    }

    bool enforces() const override { return false; }
    at::Device device() const override { return device_; }

private:
    std::int64_t device_bytes() const {
        try {
            return static_cast<std::int64_t>(allocator_->getMemoryInfo(device_.index()).second);
        } catch (const c10::NotImplementedError&) {
            return no_budget;
        }
    }

    at::Device device_;
    c10::DeviceAllocator* allocator_;
    std::atomic<std::int64_t> budget_ = 0;  // 0: not set
};

std::unique_ptr<Meter> make_meter(at::Device device) {
    if (device.is_cpu()) return std::make_unique<CpuMeter>();
    auto* allocator = dynamic_cast<c10::DeviceAllocator*>(c10::GetAllocator(device.type()));
    if (allocator == nullptr) {
        throw Error(ErrorKind::usage,
                    str_cat("the memory of device ", device.str(),
                            " cannot be measured: its allocator keeps no statistics; use the CPU or an "
                            "accelerator that this LibTorch supports"));
    }
    return std::make_unique<DeviceMeter>(device, allocator);
}

}  // namespace

Meter& meter_of(at::Device device) {
    const at::Device one =
        device.is_cpu() ? at::Device(at::kCPU) : at::Device(device.type(), device.has_index() ? device.index() : 0);
    static std::mutex mutex;
    // Never destroyed: users may have static lifetime.
    static auto& meters = *new std::map<std::pair<at::DeviceType, at::DeviceIndex>, std::unique_ptr<Meter>>;
    const std::lock_guard lock(mutex);
    auto& meter = meters[{one.type(), one.index()}];
    if (meter == nullptr) meter = make_meter(one);
    return *meter;
}

}  // namespace microbatch
