// A function that runs in turn with its caller.
#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <c10/util/ScopeExit.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <iterator>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "microbatch/runtime/coroutine.h"
#include "support/one_thread.h"

namespace microbatch {
namespace {

std::size_t threads_now() {
    using Files = std::filesystem::directory_iterator;
    return static_cast<std::size_t>(std::distance(Files("/proc/self/task"), Files()));
}

TEST(Coroutine, RunsInTurnWithItsCaller) {
    std::string order;
    Coroutine side([&] {
        order += 'b';
        Coroutine::pause();
        order += 'd';
        Coroutine::pause();
        order += 'f';
    });
    for (const char mine : {'a', 'c', 'e'}) {
        EXPECT_FALSE(side.ended());
        order += mine;
        side.advance();
    }
    EXPECT_TRUE(side.ended());
    EXPECT_EQ(order, "abcdef");
}

TEST(Coroutine, RunsNothingBeforeItsFirstTurn) {
    bool ran = false;
    {
        Coroutine side([&] { ran = true; });
    }
    EXPECT_FALSE(ran);
}

TEST(Coroutine, RunsOnAThreadOfItsOwn) {
    std::thread::id its;
    Coroutine side([&] { its = std::this_thread::get_id(); });
    side.advance();
    EXPECT_NE(its, std::this_thread::get_id());
}

TEST(Coroutine, HandsOnWhatItThrows) {
    Coroutine side([] {
        Coroutine::pause();
        throw std::domain_error("struck");
    });
    side.advance();
    EXPECT_THROW(side.advance(), std::domain_error);
    EXPECT_TRUE(side.ended());
}

TEST(Coroutine, HandsOnWhatItThrowsAtOnceAndOfNoClass) {
    Coroutine side([] { throw 42; });
    EXPECT_THROW(side.advance(), int);
    EXPECT_TRUE(side.ended());
}

TEST(Coroutine, IsCancelledWhereItWaits) {
    std::string order;
    {
        Coroutine side([&] {
            const auto end = c10::make_scope_exit([&] { order += 'z'; });
            try {
                Coroutine::pause();
                order += 'x';
            } catch (const Coroutine::Cancelled&) {
                order += 'c';
                throw;
            }
        });
        side.advance();
        order += 'a';
    }
    EXPECT_EQ(order, "acz");
}

TEST(Coroutine, IsCancelledAgainWhereItGoesOn) {
    int times = 0;
    {
        Coroutine side([&] {
            for (int i = 0; i < 3; ++i) {
                try {
                    i == 1 ? Coroutine::on_caller([&] { times += 100; }) : Coroutine::pause();
                } catch (const Coroutine::Cancelled&) {
                    ++times;
                }
            }
        });
        side.advance();
    }
    EXPECT_EQ(times, 3);
}

TEST(Coroutine, ThatIsCancelledMayThrowAnything) {
    Coroutine* side = new Coroutine([] {
        try {
            Coroutine::pause();
        } catch (const std::exception&) {
            throw std::runtime_error("another");
        }
    });
    side->advance();
    EXPECT_NO_THROW(delete side);
}

TEST(Coroutine, HasItsCallerDoWork) {
    std::vector<std::thread::id> ids;
    Coroutine side([&] {
        for (int i = 0; i < 3; ++i) {
            Coroutine::on_caller([&] { ids.push_back(std::this_thread::get_id()); });
            if (i == 1) Coroutine::pause();
        }
    });
    side.advance();
    EXPECT_EQ(ids.size(), 2U);
    EXPECT_FALSE(side.ended());
    side.advance();
    EXPECT_EQ(ids, std::vector(3, std::this_thread::get_id()));
    EXPECT_TRUE(side.ended());
}

TEST(Coroutine, SeesWhatTheWorkThrows) {
    std::string seen;
    Coroutine side([&] {
        try {
            Coroutine::on_caller([] { throw std::domain_error("struck"); });
        } catch (const std::domain_error& error) {
            seen = error.what();
        }
        Coroutine::on_caller([&] { seen += " once"; });
        Coroutine::pause();
        Coroutine::on_caller([] { throw std::range_error("again"); });
    });
    side.advance();
    EXPECT_EQ(seen, "struck once");
    EXPECT_THROW(side.advance(), std::range_error);
    EXPECT_TRUE(side.ended());
}

TEST(Coroutine, DestroysItsFunctionWhenItEnds) {
    auto held = std::make_shared<int>(1);
    const std::weak_ptr<int> watch = held;
    Coroutine side([held = std::move(held)] { Coroutine::pause(); });
    side.advance();
    EXPECT_FALSE(watch.expired());
    side.advance();
    EXPECT_TRUE(watch.expired());
}

TEST(Coroutine, StartsWithTheStateOfItsCaller) {
    for (const bool grad : {false, true}) {
        const at::AutoGradMode mode(grad);
        bool found = !grad;
        std::optional<Coroutine> side(std::in_place, [&] { found = at::GradMode::is_enabled(); });
        side->advance();
        EXPECT_EQ(found, grad);
    }
}

TEST(Coroutine, KeepsItsOwnState) {
    bool its = true;
    Coroutine side([&] {
        const at::NoGradGuard no_grad;
        Coroutine::pause();
        its = at::GradMode::is_enabled();
    });
    side.advance();
    EXPECT_TRUE(at::GradMode::is_enabled());
    {
        const at::NoGradGuard no_grad;
        const at::AutoGradMode grad(true);
        side.advance();
    }
    EXPECT_FALSE(its);
}

TEST(Coroutine, StartsWithTheAutocastOfItsCaller) {
    const at::ScalarType before = at::autocast::get_autocast_dtype(at::kCPU);
    const auto put_back = c10::make_scope_exit([&] {
        at::autocast::set_autocast_enabled(at::kCPU, false);
        at::autocast::set_autocast_dtype(at::kCPU, before);
    });
    for (const at::ScalarType type : {at::kHalf, at::kBFloat16}) {
        at::autocast::set_autocast_enabled(at::kCPU, true);
        at::autocast::set_autocast_dtype(at::kCPU, type);
        at::ScalarType found = at::kDouble, made = at::kDouble;
        Coroutine side([&] {
            found = at::autocast::get_autocast_dtype(at::kCPU);
            made = at::mm(at::ones({2, 2}), at::ones({2, 2})).scalar_type();
        });
        side.advance();
        EXPECT_EQ(found, type);
        EXPECT_EQ(made, type);
    }
}

TEST(Coroutine, MayBeOneOfMany) {
    const std::size_t before = threads_now();
    std::vector<std::unique_ptr<Coroutine>> all;
    std::vector<int> turns(200, 0);
    for (int& count : turns) {
        all.push_back(std::make_unique<Coroutine>([&count] {
            for (;;) {
                ++count;
                Coroutine::on_caller([&count] { ++count; });
                Coroutine::pause();
            }
        }));
    }
    for (int turn = 0; turn < 5; ++turn) {
        for (const auto& one : all) one->advance();
    }
    EXPECT_EQ(turns, std::vector<int>(200, 10));
    all.clear();
    EXPECT_EQ(turns, std::vector<int>(200, 10));
    EXPECT_EQ(threads_now(), before);
}

TEST(Coroutine, MayHaveCoroutinesOfItsOwn) {
    std::string order;
    Coroutine outer([&] {
        Coroutine inner([&] {
            order += 'b';
            Coroutine::pause();
            order += 'd';
        });
        order += 'a';
        inner.advance();
        order += 'c';
        inner.advance();
        Coroutine::pause();
        order += 'e';
    });
    outer.advance();
    outer.advance();
    EXPECT_EQ(order, "abcde");
}

TEST(Coroutine, MayEndInAnyOrder) {
    std::vector<int> ended;
    auto first = std::make_unique<Coroutine>([&] {
        const auto end = c10::make_scope_exit([&] { ended.push_back(1); });
        Coroutine::pause();
    });
    auto second = std::make_unique<Coroutine>([&] {
        const auto end = c10::make_scope_exit([&] { ended.push_back(2); });
        Coroutine::pause();
    });
    first->advance();
    second->advance();
    second.reset();
    first.reset();
    EXPECT_EQ(ended, (std::vector{2, 1}));
}

}  // namespace
}  // namespace microbatch
