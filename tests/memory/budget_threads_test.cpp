// The budget when several threads allocate at once.
#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <atomic>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

#include "memory/budget.h"
#include "microbatch/memory/budget_allocator.h"

namespace microbatch {
namespace {

using test::bytes;
using test::live;
using test::out_of_memory_message;
using test::peak;

class BudgetThreads : public test::BudgetTest {
protected:
    static void SetUpTestSuite() { install_budget_allocator(); }
};

TEST_F(BudgetThreads, AnAllocationInsideParallelForIsRefusedToo) {
    at::set_num_threads(2);
    const BudgetScope scope(live() + 1'000'000);
    {
        // The loop of a TensorIterator, because it runs in LibTorch's own at::parallel_for with its threads.
        at::Tensor out = at::zeros({100'000});
        auto iterator = at::TensorIterator::nullary_op(out);
        std::mutex mutex;
        std::set<std::thread::id> threads;
        const auto loop_with = [&](std::int64_t size) {
            return [&, size](char**, const std::int64_t*, std::int64_t, std::int64_t) {
                const at::Tensor scratch = bytes(size);
                const std::lock_guard lock(mutex);
                threads.insert(std::this_thread::get_id());
            };
        };
        iterator.for_each(loop_with(1000), /*grain_size=*/1000);
        EXPECT_EQ(threads.size(), 2u);
        out_of_memory_message([&] { iterator.for_each(loop_with(2'000'000), /*grain_size=*/1000); });
    }
    at::set_num_threads(1);
    EXPECT_EQ(live(), start_);
}

/// 4 threads at once, each with its number.
template <class Work>
void in_four_threads(const Work& work) {
    std::vector<std::thread> threads;
    for (int i = 0; i < 4; ++i) threads.emplace_back([&work, i] { work(i); });
    for (auto& thread : threads) thread.join();
}

TEST_F(BudgetThreads, CountsExactlyFromManyThreads) {
    std::vector<std::vector<at::Tensor>> kept(4);
    in_four_threads([&](int thread) {
        for (std::int64_t i = 1; i <= 5000; ++i) {
            const at::Tensor passing = bytes(i);
            if (i % 100 == 0) kept[static_cast<std::size_t>(thread)].push_back(bytes(i + thread));
        }
    });
    // 50 a thread: 100 + 200 + ... + 5000 = 127,500, and the thread's number 50 times: 50 (0 + 1 + 2 + 3).
    EXPECT_EQ(live(), start_ + 4 * 127'500 + 300);
    EXPECT_GE(peak(), live());
    EXPECT_LE(peak(), live() + 4 * 5000);
    in_four_threads([&](int thread) { kept[static_cast<std::size_t>((thread + 1) % 4)].clear(); });  // by another one
    EXPECT_EQ(live(), start_);
}

TEST_F(BudgetThreads, ManyThreadsNeverGoOverTheBudgetTogether) {
    const BudgetScope scope(start_ + 100'000);
    std::atomic<int> refused = 0;
    in_four_threads([&](int) {
        for (int round = 0; round < 1000; ++round) {
            std::vector<at::Tensor> kept;
            try {
                for (int i = 0; i < 20; ++i) kept.push_back(bytes(7001));
            } catch (const c10::OutOfMemoryError&) {
                ++refused;
            }
        }
    });
    EXPECT_EQ(refused.load(), 4000);  // 20 are too many for one thread alone
    EXPECT_LE(peak(), start_ + 100'000);
    EXPECT_GT(peak(), start_ + 100'000 - 7001);
    EXPECT_EQ(live(), start_);
}

TEST_F(BudgetThreads, ARefusalInOneThreadRefusesNothingInAnother) {
    const BudgetScope scope(start_ + 100'000);
    std::atomic<bool> done = false;
    std::vector<std::thread> greedy;
    for (int i = 0; i < 3; ++i) {
        greedy.emplace_back([&done] {
            while (!done) out_of_memory_message([] { bytes(100'001); });
        });
    }
    int refused = 0;
    for (int i = 0; i < 1'000'000; ++i) {
        try {
            bytes(10);  // never more than this is live
        } catch (const c10::OutOfMemoryError&) {
            ++refused;
        }
    }
    done = true;
    for (auto& thread : greedy) thread.join();
    EXPECT_EQ(refused, 0);
}

}  // namespace
}  // namespace microbatch
