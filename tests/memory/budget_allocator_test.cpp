#include "microbatch/memory/budget_allocator.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <c10/core/Allocator.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <cstring>
#include <limits>
#include <vector>

#include "memory/budget.h"
#include "microbatch/core/units.h"
#include "support/errors.h"
#include "support/one_thread.h"

namespace microbatch {
namespace {

using test::bytes;
using test::live;
using test::out_of_memory_message;
using test::peak;

constexpr std::int64_t largest = std::numeric_limits<std::int64_t>::max();

at::Tensor made_before;
MemoryUse use_before_install;

/// Before any test: a tensor of the allocator that was there first, then ours.
class Install : public ::testing::Environment {
    void SetUp() override {
        made_before = at::arange(1000, at::kLong);
        use_before_install = memory_use();
        install_budget_allocator();
    }
    void TearDown() override { made_before = at::Tensor(); }
};
const auto* const environment = ::testing::AddGlobalTestEnvironment(new Install);

class BudgetAllocator : public test::BudgetTest {};

TEST_F(BudgetAllocator, CountsNothingBeforeItIsInstalled) {
    EXPECT_EQ(use_before_install.live_bytes, 0);
    EXPECT_EQ(use_before_install.peak_bytes, 0);
}

TEST_F(BudgetAllocator, TensorsMadeBeforeSurviveAndAreNeverCounted) {
    EXPECT_EQ(made_before[999].item<std::int64_t>(), 999);
    made_before.resize_({2000});  // grows by the allocator that it came from, not by ours
    EXPECT_EQ(made_before[999].item<std::int64_t>(), 999);
    EXPECT_EQ(live(), start_);
    made_before = at::Tensor();
    EXPECT_EQ(live(), start_);
}

TEST_F(BudgetAllocator, CountsTheBytesThatWereAskedFor) {
    for (const std::int64_t count : {1, 3, 63, 64, 65, 1000, 4097, 1'000'003}) {
        reset_peak_memory();
        const at::Tensor a = bytes(count), b = at::empty({count}, at::kDouble);
        EXPECT_EQ(live(), start_ + 9 * count);
        EXPECT_EQ(peak(), start_ + 9 * count);
    }
    EXPECT_EQ(live(), start_);
}

TEST_F(BudgetAllocator, ThePeakIsTheMostSinceItWasReset) {
    {
        const at::Tensor a = bytes(1000);
        bytes(500);
        bytes(300);
        EXPECT_EQ(peak(), start_ + 1500);
        install_budget_allocator();  // a second time: nothing happens
        EXPECT_EQ(live(), start_ + 1000);
        EXPECT_EQ(peak(), start_ + 1500);
        reset_peak_memory();
        EXPECT_EQ(peak(), start_ + 1000);  // begins at what is live
        bytes(10);
    }
    EXPECT_EQ(peak(), start_ + 1010);
}

TEST_F(BudgetAllocator, AlignsEveryTensorTo64Bytes) {
    std::vector<at::Tensor> kept;
    for (std::int64_t count = 1; count < 2'000'000; count = count * 3 / 2 + 1) {
        kept.push_back(bytes(count));
        EXPECT_EQ(reinterpret_cast<std::uintptr_t>(kept.back().data_ptr()) % 64, 0u) << count;
        kept.back().fill_(7);  // all of it is there to be written
    }
}

TEST_F(BudgetAllocator, ATensorWithoutElementsCostsNothing) {
    const BudgetScope scope(std::max<std::int64_t>(start_, 1));  // not one byte more
    const at::Tensor a = bytes(0), b = at::empty({3, 0});
    EXPECT_EQ(live(), start_);
    EXPECT_EQ((a.numel() + b.numel()), 0);
}

TEST_F(BudgetAllocator, ResizingKeepsTheContents) {
    at::Tensor a = at::arange(100, at::kInt);
    a.resize_({10'000});
    EXPECT_EQ(live(), start_ + 40'000);
    EXPECT_EQ(peak(), start_ + 40'400);  // old and new at once while copying
    for (int i = 0; i < 100; ++i) EXPECT_EQ(a[i].item<int>(), i);
    a.resize_({5});
    a.resize_({100});
    EXPECT_EQ(a[99].item<int>(), 99);
    {
        const BudgetScope scope(live() + 100);
        out_of_memory_message([&] { a.resize_({1'000'000}); });
    }
    EXPECT_EQ(a[99].item<int>(), 99);
}

TEST_F(BudgetAllocator, TheRawInterfaceAndCloneAreCountedToo) {
    c10::Allocator* allocator = c10::GetAllocator(at::kCPU);
    void* raw = allocator->raw_allocate(1000);
    std::memset(raw, 5, 1000);
    EXPECT_EQ(live(), start_ + 1000);
    {
        const c10::DataPtr copy = allocator->clone(raw, 1000);
        EXPECT_EQ(live(), start_ + 2000);
        EXPECT_EQ(std::memcmp(copy.get(), raw, 1000), 0);
    }
    allocator->raw_deallocate(raw);
    EXPECT_EQ(live(), start_);
    allocator->raw_deallocate(allocator->raw_allocate(0));
}

TEST_F(BudgetAllocator, WhatIsExpectedIsInThePeakAndHoldsNothing) {
    reset_peak_memory();
    const std::int64_t cached = memory_use().cached_bytes;
    expect_memory(5000);
    EXPECT_EQ(peak(), start_ + 5000);
    EXPECT_EQ(live(), start_);
    EXPECT_EQ(memory_use().cached_bytes, cached);
    const at::Tensor a = bytes(4000);
    expect_memory(500);
    EXPECT_EQ(peak(), start_ + 5000);
    expect_memory(0);
    EXPECT_EQ(peak(), start_ + 5000);
}

TEST_F(BudgetAllocator, RefusesToExpectWhatDoesNotFit) {
    const BudgetScope scope(start_ + 1000);
    expect_memory(1000);
    EXPECT_NE(out_of_memory_message([] { expect_memory(1001); }).find("1001 B"), std::string::npos);
    EXPECT_EQ(live(), start_);
    fail_allocation(1);
    out_of_memory_message([] { expect_memory(1); });
    expect_memory(1);
}

TEST_F(BudgetAllocator, RefusesTheFirstByteAboveTheBudgetAndGivesTheLastOneBelow) {
    const at::Tensor held = bytes(500);
    const BudgetScope scope(live() + 1000);
    const std::string message = out_of_memory_message([] { bytes(1001); });
    for (const std::int64_t size : {std::int64_t{1001}, live(), memory_budget()}) {
        EXPECT_NE(message.find(format_bytes(size)), std::string::npos) << message;
    }
    EXPECT_EQ(live(), start_ + 500);
    EXPECT_EQ(peak(), start_ + 500);  // what was refused was never there
    const at::Tensor fits = bytes(1000);
    EXPECT_EQ(live(), memory_budget());
    out_of_memory_message([] { bytes(1); });
}

TEST_F(BudgetAllocator, ABudgetBelowWhatIsLiveStopsOnlyWhatComes) {
    at::Tensor held = bytes(10'000);
    const BudgetScope scope(start_ + 100);
    held.fill_(3);
    out_of_memory_message([] { bytes(1); });
    EXPECT_EQ(live(), start_ + 10'000);
    held = at::Tensor();
    EXPECT_EQ(bytes(100).numel(), 100);
}

TEST_F(BudgetAllocator, AnAbsurdSizeIsAnErrorAndNothingElse) {
    const at::Tensor held = bytes(1000);
    c10::Allocator* allocator = c10::GetAllocator(at::kCPU);
    for (const std::size_t size : {static_cast<std::size_t>(largest), static_cast<std::size_t>(largest) - 500,
                                   std::numeric_limits<std::size_t>::max(), std::size_t{1} << 60}) {
        EXPECT_ANY_THROW(auto unused = allocator->allocate(size)) << size;
        const BudgetScope scope(live() + 10);
        out_of_memory_message([&] { auto unused = allocator->allocate(size); });
    }
    EXPECT_EQ(live(), start_ + 1000);
    EXPECT_EQ(peak(), start_ + 1000);
}

TEST_F(BudgetAllocator, ScopesNestAndRestoreAfterExceptions) {
    {
        const BudgetScope outer(start_ + 1'000'000);
        try {
            const BudgetScope inner(start_ + 1000);
            EXPECT_EQ(memory_budget(), start_ + 1000);
            bytes(2000);
            ADD_FAILURE() << "no exception";
        } catch (const c10::OutOfMemoryError&) {
        }
        EXPECT_EQ(memory_budget(), start_ + 1'000'000);
        EXPECT_EQ(set_memory_budget(start_ + 5), start_ + 1'000'000);
        EXPECT_EQ(set_memory_budget(start_ + 1'000'000), start_ + 5);
    }
    EXPECT_EQ(memory_budget(), no_budget);
}

TEST_F(BudgetAllocator, RefusesABudgetThatIsNotAboveZero) {
    test::expect_usage_error({"0"}, [] { set_memory_budget(0); });
    test::expect_usage_error({"-7"}, [] { set_memory_budget(-7); });
    test::expect_usage_error({"-7"}, [] { BudgetScope{-7}; });
    EXPECT_EQ(memory_budget(), no_budget);
}

TEST_F(BudgetAllocator, AnAllocationInsideBackwardIsRefusedToo) {
    const at::Tensor weight = at::ones({1000}).requires_grad_();
    for (int attempt = 0; attempt < 3; ++attempt) {
        at::Tensor loss = weight.square().exp().sum();
        {
            const BudgetScope scope(live() + 2000);  // half a gradient
            out_of_memory_message([&] { loss.backward({}, /*retain_graph=*/false); });
            EXPECT_LE(live(), memory_budget());
        }
        EXPECT_FALSE(weight.grad().defined());
    }
    weight.square().sum().backward();
    EXPECT_EQ(weight.grad()[0].item<float>(), 2.0F);
}

}  // namespace
}  // namespace microbatch
