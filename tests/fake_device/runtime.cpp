// Tells torch of the device: its guard, its hooks, its name.
#include <ATen/core/Tensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstring>

#include "fake_device/fake_device.h"
#include "fake_device/generator.h"
#include "fake_device/memory.h"
#include "fake_device/stream.h"

namespace fake {
namespace {

struct Guard final : c10::impl::DeviceGuardImplInterface {
    c10::DeviceType type() const override { return c10::kPrivateUse1; }
    c10::Device exchangeDevice(c10::Device) const override { return device(); }
    c10::Device getDevice() const override { return device(); }
    void setDevice(c10::Device) const override {}
    void uncheckedSetDevice(c10::Device) const noexcept override {}
    c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, device()); }
    c10::Stream getDefaultStream(c10::Device) const override { return getStream(device()); }
    c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return getStream(device()); }
    c10::Stream getNewStream(c10::Device, int) const override { return getStream(device()); }
    c10::Stream exchangeStream(c10::Stream) const override { return getStream(device()); }
    c10::DeviceIndex deviceCount() const noexcept override { return 1; }
    void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
    void block(void*, const c10::Stream&) const override {}
    bool queryEvent(void*) const override { return true; }
    bool queryStream(const c10::Stream&) const override { return true; }
    void synchronizeStream(const c10::Stream&) const override { wait(); }
    void synchronizeEvent(void*) const override { wait(); }
    void synchronizeDevice(c10::DeviceIndex) const override { wait(); }
};

struct Hooks final : at::PrivateUse1HooksInterface {
    bool isBuilt() const override { return true; }
    bool isAvailable() const override { return true; }
    bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
    c10::DeviceIndex deviceCount() const override { return 1; }
    void setCurrentDevice(c10::DeviceIndex) const override {}
    c10::DeviceIndex getCurrentDevice() const override { return 0; }
    c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
    c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
    const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return default_generator(); }
    at::Generator getNewGenerator(c10::DeviceIndex) const override { return make_generator(); }
    at::Device getDeviceFromPtr(void*) const override { return device(); }
    bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
    at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator(); }
    void resizePrivateUse1Bytes(const c10::Storage& storage, std::size_t bytes) const override {
        resize_storage(storage, bytes);
    }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

const bool registered = [] {
    c10::register_privateuse1_backend("fake");
    c10::SetAllocator(c10::kPrivateUse1, &allocator());
    behind(nullptr);  // takes its addresses now: a test may set limits that forbid it later
    at::RegisterPrivateUse1HooksInterface(new Hooks);
    return true;
}();

}  // namespace

c10::Device device() {
    return {c10::kPrivateUse1, 0};
}

}  // namespace fake

extern "C" {
void fake_seed(std::uint64_t seed) {
    at::Generator generator = fake::default_generator();
    generator.set_current_seed(seed);
}
void fake_get_generator_state(void* to) {
    const at::Tensor state = fake::default_generator().get_state();
    std::memcpy(to, state.const_data_ptr(), state.nbytes());
}
void fake_set_generator_state(const void* from) {
    at::Generator generator = fake::default_generator();
    const at::Tensor state = generator.get_state();
    std::memcpy(state.mutable_data_ptr(), from, state.nbytes());
    generator.set_state(state);
}
void fake_set_memory(std::int64_t bytes) {
    fake::set_memory(bytes);
}
std::int64_t fake_memory() {
    return fake::memory();
}
void fake_fail_allocation(std::int64_t n) {
    fake::fail_allocation(n);
}
std::int64_t fake_allocations() {
    return fake::allocations();
}
void fake_reset_counts() {
    fake::reset_counts();
}
std::int64_t fake_host_reads() {
    return fake::counts().host_reads();
}
std::int64_t fake_blocking_uploads() {
    return fake::counts().blocking_uploads;
}
}
