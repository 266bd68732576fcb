// What an allocation costs beside the default allocator's: two measured times, so in a process and a label of its own.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <string>

#include "microbatch/memory/budget_allocator.h"

namespace microbatch {
namespace {

/// Nanoseconds of one allocation and its release: the least of many tries, for the machine has other work.
double nanoseconds_of_one(c10::Allocator* allocator, std::size_t size) {
    double least = std::numeric_limits<double>::infinity();
    for (int attempt = 0; attempt < 50; ++attempt) {
        const auto start = std::chrono::steady_clock::now();
        for (int i = 0; i < 200; ++i) auto passing = allocator->allocate(size);
        const std::chrono::duration<double, std::nano> time = std::chrono::steady_clock::now() - start;
        least = std::min(least, time.count() / 200);
    }
    return least;
}

TEST(AllocationCost, IsAtMost100NanosecondsMoreThanWithTheDefaultAllocator) {
#ifdef __SANITIZE_ADDRESS__
    GTEST_SKIP()
        << "the sanitizer writes its own bytes around every block, so the two times say nothing of the allocator";
#endif
    install_budget_allocator();
    for (std::size_t size = 64; size <= std::size_t{64} << 20; size *= 8) {
        const double theirs = nanoseconds_of_one(c10::GetDefaultCPUAllocator(), size);
        const double ours = nanoseconds_of_one(c10::GetAllocator(at::kCPU), size);
        RecordProperty("ns_" + std::to_string(size), std::to_string(theirs) + " -> " + std::to_string(ours));
        EXPECT_LT(ours, theirs + 100) << size;
    }
}

}  // namespace
}  // namespace microbatch
