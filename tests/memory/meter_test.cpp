#include "microbatch/memory/meter.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>
#include <torch/library.h>

#include <cstdlib>
#include <limits>
#include <map>

#include "memory/budget.h"
#include "support/errors.h"

namespace microbatch {
namespace {

using test::bytes;
using test::live;

constexpr auto all = static_cast<std::size_t>(c10::CachingAllocator::StatType::AGGREGATE);

/// An accelerator's allocator over host memory: rounds to 512 bytes and keeps what is freed until it is emptied.
class FakeAllocator final : public c10::DeviceAllocator {
public:
    c10::DataPtr allocate(std::size_t size) override {
        if (size == 0) return {nullptr, nullptr, &release, device};
        const std::size_t rounded = (size + 511) / 512 * 512;
        void* data = std::malloc(rounded);
        sizes[data] = rounded;
        statistics.allocated_bytes[all].increase(rounded);
        statistics.reserved_bytes[all].increase(rounded);
        return {data, data, &release, device};
    }
    c10::DeleterFnPtr raw_deleter() const override { return &release; }
    void copy_data(void* target, const void* source, std::size_t size) const override {
        default_copy_data(target, source, size);
    }
    bool initialized() override { return true; }
    void emptyCache(c10::MempoolId_t) override {
        auto& reserved = statistics.reserved_bytes[all];
        reserved.decrease(static_cast<std::size_t>(reserved.current - statistics.allocated_bytes[all].current));
    }
    void recordStream(const c10::DataPtr&, c10::Stream) override {}
    c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override { return statistics; }
    void resetAccumulatedStats(c10::DeviceIndex) override {}
    void resetPeakStats(c10::DeviceIndex) override { statistics.allocated_bytes[all].reset_peak(); }
    std::pair<std::size_t, std::size_t> getMemoryInfo(c10::DeviceIndex index) override {
        if (!knows_its_size) return c10::DeviceAllocator::getMemoryInfo(index);
        return {1 << 20, 8 << 20};
    }

    static void release(void* data);

    const at::Device device{at::kPrivateUse1, 0};
    std::map<void*, std::size_t> sizes;
    c10::CachingDeviceAllocator::DeviceStats statistics;
    bool knows_its_size = true;
};

FakeAllocator fake;

void FakeAllocator::release(void* data) {
    if (data == nullptr) return;
    fake.statistics.allocated_bytes[all].decrease(fake.sizes.extract(data).mapped());
    std::free(data);
}

at::Tensor empty_on_fake(c10::SymIntArrayRef shape, std::optional<at::ScalarType> type, std::optional<at::Layout>,
                         std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
    constexpr c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
    return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(shape), &fake, keys, type.value_or(at::kFloat), format);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
    library.impl("empty.memory_format", &empty_on_fake);
}

class MeterTest : public ::testing::Test {
protected:
    static void SetUpTestSuite() { c10::SetAllocator(at::kPrivateUse1, &fake); }
    void SetUp() override {
        fake.emptyCache({0, 0});
        fake.resetPeakStats(0);
        fake.knows_its_size = true;
    }
    const at::Device device_{at::kPrivateUse1, 0};
};

TEST_F(MeterTest, OfTheCpuIsTheBudgetAllocator) {
    Meter& meter = meter_of(at::kCPU);
    EXPECT_EQ(&meter, &meter_of(at::Device(at::kCPU, 0)));
    EXPECT_EQ(meter.device(), at::Device(at::kCPU));
    EXPECT_TRUE(meter.enforces());
    EXPECT_EQ(meter.budget(), no_budget);
    const std::int64_t before = meter.use().live_bytes;
    const at::Tensor held = bytes(1'000'000);
    bytes(10);
    EXPECT_EQ(meter.use().live_bytes, before + 1'000'000);
    EXPECT_EQ(meter.use().peak_bytes, before + 1'000'010);
    meter.reset_peak();
    EXPECT_EQ(meter.use().peak_bytes, before + 1'000'000);
    EXPECT_GT(meter.use().cached_bytes, 0);
    meter.release_cached();
    EXPECT_EQ(meter.use().cached_bytes, 0);
    meter.set_budget(live() + 100);
    EXPECT_EQ(meter.budget(), memory_budget());
    test::out_of_memory_message([] { bytes(101); });
    meter.set_budget(no_budget);
}

TEST_F(MeterTest, OfAnAcceleratorAsksItsAllocator) {
    Meter& meter = meter_of(device_);
    EXPECT_EQ(&meter, &meter_of(at::kPrivateUse1));  // without an index: the first
    EXPECT_EQ(meter.device(), device_);
    EXPECT_FALSE(meter.enforces());
    const auto on_device = [this](std::int64_t count) { return at::empty({count}, device_); };
    const at::Tensor held = on_device(1000);  // 4000 bytes, 4096 of the device's
    on_device(100);
    EXPECT_EQ(meter.use().live_bytes, 4096);
    EXPECT_EQ(meter.use().peak_bytes, 4096 + 512);
    EXPECT_EQ(meter.use().cached_bytes, 512);
    meter.release_cached();
    EXPECT_EQ(meter.use().cached_bytes, 0);
    meter.reset_peak();
    EXPECT_EQ(meter.use().peak_bytes, 4096);
}

TEST_F(MeterTest, AnAcceleratorsBudgetIsItsMemoryUntilOneIsSet) {
    Meter& meter = meter_of(device_);
    EXPECT_EQ(meter.budget(), 8 << 20);
    fake.knows_its_size = false;
    EXPECT_EQ(meter.budget(), no_budget);
    meter.set_budget(1000);
    EXPECT_EQ(meter.budget(), 1000);
    EXPECT_EQ(at::empty({1000}, device_).numel(), 1000);  // not enforced
    EXPECT_NE(memory_budget(), 1000);                     // the CPU has its own
    test::expect_usage_error({"0"}, [&] { meter.set_budget(0); });
    test::expect_usage_error({"-5"}, [&] { meter.set_budget(-5); });
    EXPECT_EQ(meter.budget(), 1000);
}

TEST_F(MeterTest, ADeviceWithoutStatisticsIsNamed) {
    test::expect_usage_error({"meta"}, [] { meter_of(at::kMeta); });
    test::expect_usage_error({"cuda:3"}, [] { meter_of(at::Device(at::kCUDA, 3)); });
    test::expect_usage_error({"meta"}, [] { meter_of(at::kMeta); });  // leaves nothing half created
}

}  // namespace
}  // namespace microbatch
