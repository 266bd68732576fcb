#include "microbatch/memory/memory_trace.h"

#include <gtest/gtest.h>

#include <thread>
#include <vector>

#include "memory/budget.h"
#include "support/models.h"

namespace microbatch {
namespace {

using test::bytes;
using test::live;
using Bytes = std::vector<std::int64_t>;

class Trace : public test::BudgetTest {
protected:
    static void SetUpTestSuite() { install_budget_allocator(); }
};

TEST_F(Trace, HoldsTheLiveBytesAfterEveryAllocationAndRelease) {
    MemoryTrace trace(at::kCPU);
    {
        const at::Tensor a = bytes(100);
        bytes(5000);
        bytes(0);
        const at::Tensor b = bytes(1'000'000);
    }
    const std::int64_t s = start_;
    EXPECT_EQ(trace.live_bytes(), (Bytes{s + 100, s + 5100, s + 100, s + 1'000'100, s + 100, s}));
    trace.clear();
    EXPECT_TRUE(trace.live_bytes().empty());
    bytes(7);
    EXPECT_EQ(trace.live_bytes(), (Bytes{s + 7, s}));
    EXPECT_TRUE(trace.complete());
}

TEST_F(Trace, HoldsWhatIsExpectedAndNothingOfWhatIsUntraced) {
    const MemoryTrace trace(at::kCPU);
    expect_memory(100);
    at::Tensor kept;
    {
        const UntracedMemory untraced;
        kept = bytes(30);
        bytes(20);
    }
    bytes(1);
    EXPECT_EQ(trace.live_bytes(), (Bytes{start_ + 100, start_, start_ + 31, start_ + 30}));
}

TEST_F(Trace, EndsWhenItIsStopped) {
    MemoryTrace trace(at::kCPU);
    bytes(3);
    trace.stop();
    trace.stop();
    bytes(4);
    EXPECT_EQ(trace.live_bytes(), (Bytes{start_ + 3, start_}));
}

TEST_F(Trace, ARefusedAllocationLeavesNoTrace) {
    const BudgetScope scope(start_ + 1000);
    const MemoryTrace trace(at::kCPU);
    test::out_of_memory_message([] { bytes(1001); });
    EXPECT_TRUE(trace.live_bytes().empty());
}

TEST_F(Trace, AnInnerTraceHasItsEventsForItself) {
    MemoryTrace outer(at::kCPU);
    bytes(1);
    {
        const MemoryTrace inner(at::kCPU);
        bytes(2);
        EXPECT_EQ(inner.live_bytes(), (Bytes{start_ + 2, start_}));
    }
    bytes(3);
    EXPECT_EQ(outer.live_bytes(), (Bytes{start_ + 1, start_, start_ + 3, start_}));
}

TEST_F(Trace, OtherThreadsAndOtherDevicesAreNotInIt) {
    const MemoryTrace trace(at::kCPU), meta(at::kMeta);
    std::thread([] { bytes(100); }).join();
    bytes(200);
    EXPECT_TRUE(trace.live_bytes().empty());  // hidden by the one that came after
    EXPECT_TRUE(meta.live_bytes().empty());
}

TEST_F(Trace, AWorkersBytesAreInTheFiguresButNoEventsOfTheirOwn) {
    const MemoryTrace trace(at::kCPU);
    at::Tensor of_worker;
    std::thread([&of_worker] { of_worker = bytes(5000); }).join();
    bytes(10);
    EXPECT_EQ(trace.live_bytes(), (Bytes{start_ + 5010, start_ + 5000}));
}

Bytes trace_of_step(std::int64_t samples) {
    const auto model = test::make_mlp(1, at::kFloat, 30, 50, 20);
    const Batch batch = test::regression_batch(samples, 2, at::kFloat, 30, 20);
    const LossFunction loss = test::weighted_squares(model);
    const std::int64_t before = live();
    const MemoryTrace trace(at::kCPU);
    loss(batch).sum.backward();
    Bytes above = trace.live_bytes();
    for (std::int64_t& value : above) value -= before;
    return above;
}

TEST_F(Trace, AStepIsAsLongAtAnyBatchAndItsBytesAreAffineInTheBatch) {
    const Bytes one = trace_of_step(1), two = trace_of_step(2), three = trace_of_step(3), nine = trace_of_step(9);
    ASSERT_EQ(one.size(), two.size());
    ASSERT_EQ(one.size(), three.size());
    ASSERT_EQ(one.size(), nine.size());
    EXPECT_NE(one, two);
    for (std::size_t i = 0; i < one.size(); ++i) {
        EXPECT_EQ(three[i] - one[i], 2 * (two[i] - one[i])) << i;
        EXPECT_EQ(nine[i] - one[i], 8 * (two[i] - one[i])) << i;
    }
    // The gradients of 30 x 50 + 50 + 50 x 20 + 20 parameters stay: the backward pass is in it.
    EXPECT_EQ(one.back(), 4 * (30 * 50 + 50 + 50 * 20 + 20));
}

}  // namespace
}  // namespace microbatch
