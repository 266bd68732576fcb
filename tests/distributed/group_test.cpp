#include "microbatch/distributed/group.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <thread>

#include "microbatch/core/error.h"
#include "microbatch/distributed/liveness.h"
#include "support/errors.h"
#include "support/gradients.h"
#include "support/one_thread.h"
#include "support/ranks.h"

namespace microbatch {
namespace {

using test::failures_of_ranks;
using test::run_ranks;

/// Also if an exception ends the scope, so that no thread waits for ever.
class Finally {
public:
    explicit Finally(std::function<void()> call) : call_(std::move(call)) {}
    Finally(const Finally&) = delete;
    ~Finally() { call_(); }

private:
    std::function<void()> call_;
};

class GroupOf : public testing::TestWithParam<int> {};

TEST_P(GroupOf, SumsTensorsOfAllTypesInPlaceWithTheSameBitsOnAll) {
    std::vector<at::Tensor> sums(static_cast<std::size_t>(GetParam()));
    run_ranks(GetParam(), [&](const std::shared_ptr<Group>& group) {
        at::Generator random = at::make_generator<at::CPUGeneratorImpl>(static_cast<std::uint64_t>(group->rank()));
        at::Tensor large = at::randn({10007}, random), counts = at::full({3}, group->rank() + 1, at::kLong);
        at::Tensor exact = at::full({2, 3}, group->rank() + 0.5, at::kDouble);
        group->sum({large, counts, exact});
        const double ranks = group->size();
        EXPECT_EQ(counts[1].item<std::int64_t>(), group->size() * (group->size() + 1) / 2);
        EXPECT_EQ(exact[1][2].item<double>(), ranks * ranks / 2);
        sums[static_cast<std::size_t>(group->rank())] = large;
    });
    for (const at::Tensor& one : sums) EXPECT_TRUE(test::same_bits(one, sums.front()));
}

TEST_P(GroupOf, GathersInTheOrderOfTheRanks) {
    run_ranks(GetParam(), [](const std::shared_ptr<Group>& group) {
        const std::vector<at::Tensor> all = group->gather(at::full({2}, group->rank(), at::kDouble));
        ASSERT_EQ(std::ssize(all), group->size());
        for (int i = 0; i < group->size(); ++i) EXPECT_EQ(all[static_cast<std::size_t>(i)][1].item<double>(), i);
        const std::string mine(static_cast<std::size_t>(3 * group->rank()), 'x');
        const std::vector<std::string> texts = group->gather_bytes(mine);
        for (std::size_t i = 0; i < texts.size(); ++i) EXPECT_EQ(texts[i], std::string(3 * i, 'x'));
        EXPECT_EQ(group->gather_bytes("").back(), "");
    });
}

TEST_P(GroupOf, SharesWhatOneHas) {
    run_ranks(GetParam(), [](const std::shared_ptr<Group>& group) {
        at::Tensor value = at::full({4}, group->rank() + 5.0);
        group->broadcast({value}, group->size() - 1);
        EXPECT_EQ(value[3].item<double>(), group->size() + 4.0);
        EXPECT_FALSE(group->any(false));
        EXPECT_TRUE(group->any(group->rank() == group->size() - 1));
    });
}

INSTANTIATE_TEST_SUITE_P(Sizes, GroupOf, testing::Values(1, 2, 3, 4));

TEST(LostRanks, AreNamedWithWhatTheySaid) {
    const auto failures = failures_of_ranks(3, [](const std::shared_ptr<Group>& group) {
        if (group->rank() == 1) throw std::runtime_error("out of luck");
        for (int i = 0; i < 2; ++i) {
            test::expect_error(ErrorKind::lost_rank, {"rank 1 has ended: it failed"}, [&] { group->any(false); });
        }
    });
    EXPECT_FALSE(failures[0] || failures[2]);
}

// The thread that shows that it is alive ends with it, as in a process that is killed or stopped.
TEST(LostRanks, AreFoundBySilence) {
    std::atomic<bool> over = false;
    const auto started = std::chrono::steady_clock::now();
    failures_of_ranks(2,
                      [&](const std::shared_ptr<Group>& group) {
                          group->any(false);
                          if (group->rank() == 1) {
                              group->fall_silent();
                              while (!over) std::this_thread::sleep_for(std::chrono::milliseconds(10));
                              return;
                          }
                          test::expect_error(ErrorKind::lost_rank,
                                             {"rank 1 has ended or hangs: it has shown no sign of life"},
                                             [&] { group->any(false); });
                          over = true;
                      },
                      {.silence = std::chrono::seconds(1)});
    EXPECT_LT(std::chrono::steady_clock::now() - started, std::chrono::seconds(10));
}

// It may load its data for as long as it likes.
TEST(LostRanks, AreNotThoseThatHaveNotBegunYet) {
    run_ranks(2, [&](const std::shared_ptr<Group>&) {});
    const auto store = c10::make_intrusive<c10d::HashStore>();
    const Liveness first(store, 0, 2, std::chrono::milliseconds(300));
    std::this_thread::sleep_for(std::chrono::seconds(2));
    EXPECT_EQ(first.lost(), "");
    {
        const Liveness second(store, 1, 2, std::chrono::milliseconds(300));
        std::this_thread::sleep_for(std::chrono::seconds(1));
        EXPECT_EQ(first.lost(), "");
    }
    EXPECT_NE(first.wait_for_lost().find("rank 1 has ended or hangs"), std::string::npos);
}

TEST(LostRanks, ThatAreAliveAreWaitedForUntilTheTimeout) {
    std::atomic<bool> over = false;
    failures_of_ranks(2,
                      [&](const std::shared_ptr<Group>& group) {
                          if (group->rank() == 1) {
                              while (!over) std::this_thread::sleep_for(std::chrono::milliseconds(10));
                              return;
                          }
                          const auto started = std::chrono::steady_clock::now();
                          test::expect_error(ErrorKind::lost_rank, {"a rank has not come for 2 s"},
                                             [&] { group->any(false); });
                          EXPECT_GT(std::chrono::steady_clock::now() - started, std::chrono::seconds(2));
                          over = true;
                      },
                      {.timeout = std::chrono::seconds(2), .silence = std::chrono::seconds(1)});
}

}  // namespace
}  // namespace microbatch
