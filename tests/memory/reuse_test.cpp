// Memory that is freed and reused.
#include <ATen/ops/conv2d.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/rand.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <fstream>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "memory/budget.h"
#include "support/errors.h"
#include "support/one_thread.h"

namespace microbatch {
namespace {

using test::bytes;
using test::live;
using test::out_of_memory_message;

constexpr std::int64_t mebi = 1 << 20;

std::int64_t cached() {
    return memory_use().cached_bytes;
}

std::int64_t page_faults() {
    rusage usage{};
    ::getrusage(RUSAGE_SELF, &usage);
    return usage.ru_minflt;
}

std::int64_t resident_bytes() {
    std::ifstream file("/proc/self/statm");
    std::int64_t all = 0, resident = 0;
    file >> all >> resident;
    return resident * ::sysconf(_SC_PAGESIZE);
}

/// Two convolutions and their gradients: oneDNN's scratch and activations of several sizes, 100 MiB and more.
void conv_step(std::int64_t batch) {
    static const at::Tensor first = at::rand({32, 3, 3, 3}).requires_grad_();
    static const at::Tensor second = at::rand({48, 32, 3, 3}).requires_grad_();
    const at::Tensor images = at::ones({batch, 3, 64, 64});
    at::conv2d(at::conv2d(images, first).relu(), second, {}, 2).relu().sum().backward();
    first.mutable_grad() = at::Tensor();
    second.mutable_grad() = at::Tensor();
}

template <class Step>
std::int64_t faults_of_five(const Step& step) {
    const std::int64_t before = page_faults();
    for (int i = 0; i < 5; ++i) step();
    return page_faults() - before;
}

std::int64_t default_faults = 0;
std::vector<void*> foreign;

/// What torch's own allocator does, then ours: there is no way back.
class Install : public ::testing::Environment {
    void SetUp() override {
        for (int i = 0; i < 3; ++i) conv_step(16);
        default_faults = faults_of_five([] { conv_step(16); });
        for (std::size_t size = 1; size < 40'000'000; size = size * 5 / 2 + 1) {
            foreign.push_back(c10::GetAllocator(at::kCPU)->raw_allocate(size));
        }
        install_budget_allocator();
    }
};
const auto* const environment = ::testing::AddGlobalTestEnvironment(new Install);

class Reuse : public test::BudgetTest {
    void SetUp() override {
        test::BudgetTest::SetUp();
        release_cached_memory();
    }
};

TEST_F(Reuse, WhatTheAllocatorBeforeGaveIsFreedByItAndNotCounted) {
    // oneDNN does so: raw_deallocate of the allocator of the day.
    for (void* data : foreign) {
        EXPECT_NE(c10::GetAllocator(at::kCPU), c10::GetDefaultCPUAllocator());
        c10::GetAllocator(at::kCPU)->raw_deallocate(data);
    }
    foreign.clear();
    EXPECT_EQ(live(), start_);
    EXPECT_EQ(cached(), 0);
    conv_step(16);  // its scratch was the other allocator's until now
    EXPECT_EQ(live(), start_);
}

TEST_F(Reuse, AFreedBlockServesTheNextRequestOfItsSize) {
    for (const std::int64_t size : {std::int64_t{1}, std::int64_t{1000}, std::int64_t{100'000}, 64 * mebi}) {
        const void* first = bytes(size).data_ptr();
        const std::int64_t kept = cached();
        EXPECT_GE(kept, size);
        const at::Tensor again = bytes(size);
        EXPECT_EQ(again.data_ptr(), first) << size;
        EXPECT_LT(cached(), kept);
        EXPECT_EQ(live(), start_ + size);
    }
}

TEST_F(Reuse, FreedNeighboursJoinAndServeALargerRequest) {
    std::vector<at::Tensor> pieces;
    std::vector<std::uintptr_t> places;
    { const at::Tensor whole = bytes(64 * mebi); }
    for (int i = 0; i < 15; ++i) pieces.push_back(bytes(4 * mebi));
    for (const at::Tensor& piece : pieces) places.push_back(reinterpret_cast<std::uintptr_t>(piece.data_ptr()));
    std::shuffle(pieces.begin(), pieces.end(), std::mt19937(1));
    pieces.clear();
    const at::Tensor whole = bytes(64 * mebi);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(whole.data_ptr()), *std::min_element(places.begin(), places.end()));
    EXPECT_EQ(cached(), 0);
}

TEST_F(Reuse, ReleasingGivesEverythingBackToTheSystem) {
    const at::Tensor small = bytes(100);
    const std::int64_t before = resident_bytes();
    at::ones({16 * mebi});  // 64 MiB
    for (int i = 0; i < 100; ++i) bytes(10 * i + 1);
    EXPECT_GE(cached(), 64 * mebi);
    EXPECT_GT(resident_bytes(), before + 60 * mebi);
    release_cached_memory();
    EXPECT_EQ(cached(), 0);
    EXPECT_LT(resident_bytes(), before + 4 * mebi);
    EXPECT_EQ(live(), start_ + 100);
}

TEST_F(Reuse, CachedBlocksMakeRoomUnderTheBudget) {
    const BudgetScope scope(start_ + 100 * mebi);
    { const at::Tensor a = bytes(30 * mebi), b = bytes(30 * mebi), c = bytes(20 * mebi); }
    EXPECT_GE(cached(), 80 * mebi);
    for (const std::int64_t size : {90, 40, 10, 60, 99, 1, 35}) {
        const at::Tensor one = bytes(size * mebi);
        EXPECT_LE(live() + cached(), memory_budget());
    }
    set_memory_budget(start_ + 50 * mebi);
    EXPECT_LE(live() + cached(), memory_budget());
}

TEST_F(Reuse, WithoutABudgetAllBlocksStayWithinASixteenthOfTheMostThatWasLive) {
    std::vector<at::Tensor> pieces(400);
    for (at::Tensor& piece : pieces) piece = bytes(mebi);
    for (std::size_t i = 0; i < pieces.size(); i += 2) pieces[i] = at::Tensor();  // 200 holes: too small for what comes
    EXPECT_GE(cached(), 200 * mebi);
    const at::Tensor whole = bytes(400 * mebi);
    // 600 MiB are live, the most since SetUp released all.
    EXPECT_LE(live() + cached(), start_ + 600 * mebi * 17 / 16 + 1 * mebi);
    EXPECT_GT(cached(), 0);
}

TEST_F(Reuse, AStepCausesHardlyAnyPageFaults) {
    for (int i = 0; i < 3; ++i) conv_step(16);
    const std::int64_t faults = faults_of_five([] { conv_step(16); });
    RecordProperty("default_faults", std::to_string(default_faults));
    RecordProperty("faults", std::to_string(faults));
    ASSERT_GT(default_faults, 1000) << "the default allocator causes none here: the test says nothing";
    EXPECT_LT(faults * 20, default_faults);
}

TEST_F(Reuse, TheProcessGrowsByThePeakThatIsReported) {
    for (int i = 0; i < 3; ++i) conv_step(16);  // what MKL and oneDNN keep for themselves is there
    release_cached_memory();
    const std::int64_t resident = resident_bytes();
    reset_peak_memory();
    const std::int64_t before = live();
    for (int i = 0; i < 2; ++i) conv_step(128);
    const std::int64_t peak = memory_use().peak_bytes - before;
    const std::int64_t grown = resident_bytes() - resident;
    RecordProperty("peak", std::to_string(peak));
    RecordProperty("grown", std::to_string(grown));
    ASSERT_GT(peak, 200 * mebi);
    EXPECT_NEAR(static_cast<double>(grown), static_cast<double>(peak), 0.1 * static_cast<double>(peak));
}

TEST_F(Reuse, NoBlockIsHandedOutTwice) {
    const auto work = [](unsigned seed) {
        std::mt19937 random(seed);
        std::vector<std::pair<at::Tensor, int>> kept(40);
        for (int i = 0; i < 4000; ++i) {
            auto& [tensor, mark] = kept[random() % kept.size()];
            if (tensor.defined()) {
                const auto* data = static_cast<const unsigned char*>(tensor.const_data_ptr());
                const auto wrong = [value = mark](unsigned char byte) { return byte != value; };
                ASSERT_EQ(std::find_if(data, data + tensor.numel(), wrong), data + tensor.numel());
            }
            mark = static_cast<int>(random() % 256);
            tensor = bytes(static_cast<std::int64_t>(1 + random() % (1u << (4 + random() % 15))));
            std::memset(tensor.mutable_data_ptr(), mark, static_cast<std::size_t>(tensor.numel()));
        }
    };
    std::vector<std::thread> threads;
    for (unsigned i = 0; i < 4; ++i) threads.emplace_back(work, i);
    for (auto& thread : threads) thread.join();
    EXPECT_EQ(live(), start_);
}

TEST_F(Reuse, ABlockThatAnotherThreadFreesIsReused) {
    at::Tensor passed = bytes(5 * mebi);
    const void* place = passed.data_ptr();
    std::thread([&passed] { passed = at::Tensor(); }).join();
    EXPECT_EQ(bytes(5 * mebi).data_ptr(), place);
}

TEST_F(Reuse, AForkedChildContinuesAllocatingWhateverOtherThreadsDid) {
    std::atomic<bool> done = false;
    std::thread busy([&done] {
        while (!done) bytes(1000);
    });
    int failed = 0;
    for (int i = 0; i < 100 && failed == 0; ++i) {
        const pid_t child = ::fork();
        if (child == 0) {
            ::alarm(240);  // ends a child that waits forever
            c10::Allocator* allocator = c10::GetAllocator(at::kCPU);
            allocator->raw_deallocate(allocator->raw_allocate(1000));
            ::_exit(0);
        }
        int status = -1;
        if (::waitpid(child, &status, 0) != child || status != 0) ++failed;
    }
    done = true;
    busy.join();
    EXPECT_EQ(failed, 0);
}

TEST_F(Reuse, TheAllocationThatIsToFailFailsOnceAndNoOther) {
    for (const std::int64_t countdown : {1, 2, 5}) {
        const std::int64_t before = allocation_count();
        fail_allocation(countdown);
        for (std::int64_t i = 1; i < countdown; ++i) bytes(10);
        const std::string message = out_of_memory_message([] { bytes(10); });
        EXPECT_NE(message.find("fail_allocation"), std::string::npos) << message;
        for (int i = 0; i < 10; ++i) bytes(10);
        EXPECT_EQ(allocation_count() - before, countdown + 10);
    }
    fail_allocation(1);
    bytes(0);  // takes nothing and cannot fail
    fail_allocation(0);
    bytes(10);
    test::expect_usage_error({"-3"}, [] { fail_allocation(-3); });
}

}  // namespace
}  // namespace microbatch
