#include "microbatch/memory/meter.h"

#include <ATen/Context.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/util/Exception.h>

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>

#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"
#include "microbatch/core/units.h"
#include "microbatch/memory/machine.h"
#include "microbatch/runtime/device.h"

namespace microbatch {
namespace {

std::mutex& limiter_mutex() {
    static auto& mutex = *new std::mutex;
    return mutex;
}

DeviceLimiter& device_limiter() {
    static auto& limiter = *new DeviceLimiter;
    return limiter;
}

Meter* find_meter(at::Device device) {
    try {
        return &meter_of(device);
    } catch (const Error&) {
        return nullptr;  // its allocator keeps no statistics
    }
}

bool limit_device(at::Device device, std::int64_t bytes) {
    DeviceLimiter limiter;
    {
        const std::lock_guard lock(limiter_mutex());
        limiter = device_limiter();
    }
    return limiter && limiter(device, bytes);
}

class CpuMeter final : public Meter {
public:
    CpuMeter() { install_budget_allocator(); }

    MemoryUse use() const override { return memory_use(); }
    void reset_peak() override { reset_peak_memory(); }
    void release_cached() override { release_cached_memory(); }
    std::int64_t available() const override { return available_memory_bytes(); }
    std::int64_t budget() const override { return memory_budget(); }
    bool has_budget() const override { return memory_budget() != no_budget; }
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
        const auto& reserved = statistics.reserved_bytes[all];
        return {allocated.current, allocated.peak, reserved.current - allocated.current, reserved.peak};
    }

    void reset_peak() override { allocator_->resetPeakStats(device_.index()); }
    void release_cached() override { allocator_->emptyCache(); }

    std::int64_t available() const override {
        const auto sizes = memory_info();
        return sizes ? static_cast<std::int64_t>(sizes->first) + use().cached_bytes : no_budget;
    }

    std::int64_t budget() const override {
        if (has_budget()) return budget_;
        const auto sizes = memory_info();
        return sizes ? static_cast<std::int64_t>(sizes->second) : no_budget;
    }

    bool has_budget() const override { return budget_ != no_budget; }

    void set_budget(std::int64_t bytes) override {
        require_that(bytes > 0, "the memory budget is ", bytes, " bytes; it must be above 0");
        enforces_ = limit_device(device_, bytes);
        budget_ = bytes;
    }

    bool enforces() const override { return enforces_; }
    at::Device device() const override { return device_; }

private:
    // Free and in all.
    std::optional<std::pair<std::size_t, std::size_t>> memory_info() const {
        try {
            return allocator_->getMemoryInfo(device_.index());
        } catch (const c10::NotImplementedError&) {
            return std::nullopt;
        }
    }

    at::Device device_;
    c10::DeviceAllocator* allocator_;
    std::atomic<std::int64_t> budget_ = no_budget;
    std::atomic<bool> enforces_ = false;
};

std::unique_ptr<Meter> make_meter(at::Device device) {
    if (device.is_cpu()) return std::make_unique<CpuMeter>();
    require_device(device);
    auto* allocator = dynamic_cast<c10::DeviceAllocator*>(c10::GetAllocator(device.type()));
    require_that(allocator != nullptr, "the memory of device ", device.str(),
                 " cannot be measured: its allocator keeps no statistics; use the CPU or an "
                 "accelerator that this LibTorch supports");
    at::globalContext().lazyInitDevice(device.type());  // before that, some allocators do not answer
    return std::make_unique<DeviceMeter>(device, allocator);
}

}  // namespace

void set_device_limiter(DeviceLimiter limiter) {
    const std::lock_guard lock(limiter_mutex());
    device_limiter() = std::move(limiter);
}

void require_budget_fits(const Meter& meter, std::int64_t bytes) {
    if (meter.device().is_cpu() || bytes == no_budget || meter.available() == no_budget) return;
    const std::int64_t most = meter.use().live_bytes + meter.available();
    require_that(bytes <= most, "the memory budget is ", format_bytes(bytes), ", and the device ", meter.device().str(),
                 " has ", format_bytes(most), " for this process: name a smaller budget, or none for all of it");
}

MemoryUse memory_use_of(at::Device device) {
    if (device.is_cpu()) return memory_use();
    Meter* const meter = find_meter(device);
    return meter == nullptr ? MemoryUse{} : meter->use();
}

void reset_peak_of(at::Device device) {
    if (device.is_cpu()) {
        reset_peak_memory();
    } else if (Meter* const meter = find_meter(device)) {
        meter->reset_peak();
    }
}

void release_cached_of(at::Device device) {
    if (device.is_cpu()) {
        release_cached_memory();
    } else if (Meter* const meter = find_meter(device)) {
        meter->release_cached();
    }
}

std::int64_t available_of(at::Device device) {
    return device.is_cpu() ? available_memory_bytes() : meter_of(device).available();
}

std::string fragmentation_of(at::Device device) {
    if (device.is_cpu()) return {};
    const MemoryUse use = memory_use_of(device);
    const std::int64_t reserved = use.live_bytes + use.cached_bytes;
    if (use.cached_bytes * 10 < reserved) return {};
    return str_cat(
        ", and ", format_bytes(use.cached_bytes), " of the ", format_bytes(reserved), " that ", device.str(),
        " has reserved are free in pieces between tensors (PYTORCH_ALLOC_CONF=expandable_segments:True helps "
        "on CUDA)");
}

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
