#include "microbatch/runtime/parallel.h"

#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <atomic>
#include <mutex>
#include <set>
#include <stdexcept>
#include <thread>
#include <vector>

namespace microbatch {
namespace {

class InParallel : public ::testing::Test {
protected:
    InParallel() { at::set_num_threads(2); }
};

TEST_F(InParallel, CoversEveryElementOnce) {
    for (const int threads : {1, 2, 3}) {
        at::set_num_threads(threads);
        for (const std::int64_t count : {0, 1, 2, 7, 1023, 1024, 1025, 100'003}) {
            std::vector<std::atomic<int>> seen(count);
            in_parallel(count, 0, [&](std::int64_t begin, std::int64_t end) {
                for (std::int64_t i = begin; i < end; ++i) ++seen[i];
            });
            for (const auto& times : seen) ASSERT_EQ(times, 1) << count;
        }
    }
}

TEST_F(InParallel, RunsOnTorchsThreadsAndOnThisOneBelowTheGrain) {
    const auto threads_of = [](std::int64_t grain) {
        std::mutex mutex;
        std::set<std::thread::id> threads;
        in_parallel(1000, grain, [&](std::int64_t, std::int64_t) {
            const std::lock_guard lock(mutex);
            threads.insert(std::this_thread::get_id());
        });
        return threads;
    };
    EXPECT_EQ(threads_of(1000).size(), 2U);
    EXPECT_EQ(threads_of(1001), std::set{std::this_thread::get_id()});
}

TEST_F(InParallel, PassesOnWhatAThreadThrows) {
    const auto fail = [](std::int64_t, std::int64_t end) {
        if (end == 1000) throw std::runtime_error("stop");
    };
    EXPECT_THROW(in_parallel(1000, 0, fail), std::runtime_error);
}

TEST_F(InParallel, WithinItselfItIsAPlainLoop) {
    std::atomic<std::int64_t> sum = 0;
    in_parallel(10, 0, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) {
            in_parallel(i, 0, [&](std::int64_t first, std::int64_t last) { sum += last - first; });
        }
    });
    EXPECT_EQ(sum, 45);
}

}  // namespace
}  // namespace microbatch
