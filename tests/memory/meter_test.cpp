#include "microbatch/memory/meter.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <string>

#include "fake_device/fake_device.h"
#include "memory/budget.h"
#include "support/errors.h"

namespace microbatch {
namespace {

using test::bytes;
using test::live;

class MeterTest : public ::testing::Test {
protected:
    void SetUp() override {
        meter_of(fake::device()).release_cached();
        meter_of(fake::device()).reset_peak();
    }
    void TearDown() override {
        set_device_limiter({});
        meter_of(fake::device()).set_budget(no_budget);
        fake::set_memory(1 << 30);
    }
    const at::Device device_ = fake::device();
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
    const std::int64_t before = meter.use().live_bytes;
    EXPECT_EQ(&meter, &meter_of(at::kPrivateUse1));  // without an index: the first
    EXPECT_EQ(meter.device(), device_);
    EXPECT_FALSE(meter.enforces());
    const auto on_device = [this](std::int64_t count) { return at::empty({count}, device_); };
    const at::Tensor held = on_device(1000);  // 4000 bytes, 4096 of the device's
    on_device(100);
    EXPECT_EQ(meter.use().live_bytes, before + 4096);
    EXPECT_EQ(meter.use().peak_bytes, before + 4096 + 512);
    EXPECT_EQ(meter.use().peak_reserved_bytes, before + 4096 + 512);
    EXPECT_EQ(meter.use().cached_bytes, 512);
    EXPECT_EQ(meter.available(), (1 << 30) - before - 4096);
    meter.release_cached();
    EXPECT_EQ(meter.use().cached_bytes, 0);
    EXPECT_EQ(meter.available(), (1 << 30) - before - 4096);
    meter.reset_peak();
    EXPECT_EQ(meter.use().peak_bytes, before + 4096);
}

TEST_F(MeterTest, AnAcceleratorsBudgetIsItsMemoryUntilOneIsSet) {
    Meter& meter = meter_of(device_);
    EXPECT_EQ(meter.budget(), 1 << 30);
    meter.set_budget(1000);
    EXPECT_EQ(meter.budget(), 1000);
    EXPECT_FALSE(meter.enforces());
    EXPECT_EQ(at::empty({1000}, device_).numel(), 1000);  // not enforced
    EXPECT_NE(memory_budget(), 1000);                     // the CPU has its own
    test::expect_usage_error({"0"}, [&] { meter.set_budget(0); });
    test::expect_usage_error({"-5"}, [&] { meter.set_budget(-5); });
    EXPECT_EQ(meter.budget(), 1000);
    meter.set_budget(no_budget);
    EXPECT_EQ(meter.budget(), 1 << 30);
}

TEST_F(MeterTest, ABudgetIsTheLimitOfAnAllocatorThatHasOne) {
    Meter& meter = meter_of(device_);
    set_device_limiter([](at::Device device, std::int64_t bytes) {
        EXPECT_EQ(device, fake::device());
        fake::set_memory(bytes == no_budget ? 1 << 30 : bytes);
        return true;
    });
    const std::int64_t before = meter.use().live_bytes;
    meter.set_budget(before + 4096);
    EXPECT_TRUE(meter.enforces());
    const at::Tensor fits = at::empty({1024}, device_);
    EXPECT_THROW(at::empty({1}, device_), c10::OutOfMemoryError);
    meter.set_budget(no_budget);
    EXPECT_EQ(at::empty({1024}, device_).numel(), 1024);
}

TEST_F(MeterTest, ABudgetBeyondTheMemoryOfTheDeviceIsRefusedWithBoth) {
    const Meter& meter = meter_of(device_);
    require_budget_fits(meter, std::int64_t{1} << 30);
    require_budget_fits(meter, no_budget);
    require_budget_fits(meter_of(at::kCPU), std::int64_t{1} << 50);  // its budget may be more than is free now
    test::expect_usage_error({"2 GiB", "fake:0", "1 GiB"}, [&] { require_budget_fits(meter, std::int64_t{1} << 31); });
}

TEST_F(MeterTest, WhatIsFreeBetweenTensorsIsToldApartFromWhatIsUsed) {
    EXPECT_EQ(fragmentation_of(at::kCPU), "");
    const at::Tensor held = at::empty({1 << 20}, device_);
    EXPECT_EQ(fragmentation_of(device_), "");
    at::empty({1 << 20}, device_);
    const std::string found = fragmentation_of(device_);
    EXPECT_NE(found.find("4 MiB of the 8 MiB that fake:0 has reserved"), std::string::npos) << found;
}

TEST_F(MeterTest, ADeviceThatDoesNotExistIsNamedAndSoAreThoseThatDo) {
    test::expect_usage_error({"meta"}, [] { meter_of(at::kMeta); });
    for (int i = 0; i < 2; ++i) {  // leaves nothing half created
        test::expect_usage_error({"there is no device cuda:3 here", "cpu, fake:0"},
                                 [] { meter_of(at::Device(at::kCUDA, 3)); });
    }
    test::expect_usage_error({"fake:1"}, [] { meter_of(at::Device(at::kPrivateUse1, 1)); });
}

}  // namespace
}  // namespace microbatch
