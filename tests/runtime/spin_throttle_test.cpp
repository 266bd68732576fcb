#include "microbatch/runtime/spin_throttle.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <iterator>
#include <limits>
#include <thread>

#include "support/waiting.h"

namespace microbatch {
namespace {

std::ptrdiff_t threads_of_this_process() {
    return std::distance(std::filesystem::directory_iterator("/proc/self/task"), {});
}

// Those that have ended are still listed for a moment.
bool comes_down_to(std::ptrdiff_t count) {
    return test::comes_true([count] { return threads_of_this_process() <= count; });
}

TEST(SpinThrottle, CrowdTheCoresOnlyWhileThreadsAreSeenToWait) {
    at::mm(at::ones({300, 300}), at::ones({300, 300}));  // torch's own threads are there from now on
    const std::ptrdiff_t before = threads_of_this_process();
    SpinThrottle threads;
    threads.decide(0.01);
    EXPECT_FALSE(threads.active());
    threads.decide(0.5);
    EXPECT_TRUE(threads.active());
    const auto cores = static_cast<int>(std::thread::hardware_concurrency());
    EXPECT_GT(threads_of_this_process() - before + at::get_num_threads(), cores);
    for (int i = 0; i < 19; ++i) threads.decide(0.0);
    EXPECT_TRUE(threads.active());
    threads.decide(0.1);  // not quite quiet: the count starts again
    for (int i = 0; i < 19; ++i) threads.decide(0.0);
    EXPECT_TRUE(threads.active());
    threads.decide(0.0);
    EXPECT_FALSE(threads.active());
    EXPECT_TRUE(comes_down_to(before));
}

TEST(SpinThrottle, AreNotNeededWhereTorchHasOneThread) {
    const int before = at::get_num_threads();
    SpinThrottle threads;
    threads.decide(1.0);
    ASSERT_TRUE(threads.active());
    at::set_num_threads(1);
    threads.poll();
    EXPECT_FALSE(threads.active());
    at::set_num_threads(before);
}

TEST(SpinThrottle, ChangeNoBit) {
    at::manual_seed(1);
    const at::Tensor left = at::randn({200, 300}), right = at::randn({300, 100});
    const at::Tensor expected = left.mm(right);
    SpinThrottle threads;
    threads.decide(1.0);
    EXPECT_TRUE(at::equal(left.mm(right), expected));
}

TEST(SpinThrottle, EndWhereverTheyAre) {
    const std::ptrdiff_t before = threads_of_this_process();
    {
        SpinThrottle threads;
        threads.decide(1.0);
    }
    EXPECT_TRUE(comes_down_to(before));
}

TEST(SpinThrottle, AnInvalidNumberChangesNothing) {
    SpinThrottle threads;
    threads.decide(std::numeric_limits<double>::quiet_NaN());
    EXPECT_FALSE(threads.active());
}

TEST(SpinThrottle, TimeWaitedForCoresNeverFalls) {
    const std::optional<double> first = seconds_waited_for_cores();
    ASSERT_TRUE(first);  // Linux
    EXPECT_GE(*first, 0.0);
    EXPECT_GE(*seconds_waited_for_cores(), *first);
}

}  // namespace
}  // namespace microbatch
