// The only place where running out of memory is handled.
#include "microbatch/memory/reclaim.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <functional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "microbatch/core/error.h"
#include "microbatch/memory/budget_allocator.h"
#include "support/errors.h"
#include "support/one_thread.h"

namespace microbatch {
namespace {

using Words = std::vector<std::string>;

[[noreturn]] void run_out(const std::string& what = "no memory") {
    TORCH_CHECK_WITH(OutOfMemoryError, false, what);
    throw std::logic_error("not reached");
}

/// What retry_on_oom() calls, in order, on an attempt that runs out of memory so often.
struct Trial {
    int failures = 0;
    Words calls = {};
    std::string message = {};

    /// Frees something so many times.
    Reclaimer frees(const std::string& name, int times, bool counts = true) {
        return {[this, name, times]() mutable {
                    calls.push_back(name);
                    return times-- > 0;
                },
                counts};
    }

    std::string run(const Reclaimers& reclaimers) {
        return retry_on_oom(
            reclaimers,
            [&]() -> std::string {
                calls.emplace_back("attempt");
                if (failures-- > 0) run_out("asked for 7 bytes");
                return "done";
            },
            [&] { calls.emplace_back("undo"); },
            [&](const Reclaimer& helped, const std::string& said) {
                calls.emplace_back(helped.counts ? "counted" : "not counted");
                message = said;
            },
            [&](const std::string& said) { throw Error(ErrorKind::does_not_fit, "given up: " + said); });
    }
};

TEST(RetryOnOom, ReturnsWhatTheFirstAttemptReturnsWhereItSucceeds) {
    Trial trial;
    EXPECT_EQ(trial.run({trial.frees("first", 9)}), "done");
    EXPECT_EQ(trial.calls, (Words{"attempt"}));
}

TEST(RetryOnOom, UndoesBeforeItReclaims) {
    Trial trial{.failures = 1};
    EXPECT_EQ(trial.run({trial.frees("first", 1)}), "done");
    EXPECT_EQ(trial.calls, (Words{"attempt", "undo", "first", "counted", "attempt"}));
}

TEST(RetryOnOom, AsksTheReclaimersInTheirOrderAfterEveryFailure) {
    Trial trial{.failures = 4};
    EXPECT_EQ(trial.run({trial.frees("first", 1, false), {}, trial.frees("second", 2), trial.frees("third", 9)}),
              "done");
    EXPECT_EQ(trial.calls, (Words{"attempt", "undo", "first", "not counted",                        //
                                  "attempt", "undo", "first", "second",      "counted",             //
                                  "attempt", "undo", "first", "second",      "counted",             //
                                  "attempt", "undo", "first", "second",      "third",   "counted",  //
                                  "attempt"}));
}

TEST(RetryOnOom, GivesUpAfterItUndidWhereNothingHelps) {
    Trial trial{.failures = 9};
    test::expect_error(ErrorKind::does_not_fit, {"given up", "asked for 7 bytes"}, [&] {
        trial.run({trial.frees("first", 1), trial.frees("second", 0)});
    });
    EXPECT_EQ(trial.calls, (Words{"attempt", "undo", "first", "counted", "attempt", "undo", "first", "second"}));
    Trial none{.failures = 1};
    test::expect_error(ErrorKind::does_not_fit, {"given up"}, [&] { none.run({}); });
    EXPECT_EQ(none.calls, (Words{"attempt", "undo"}));
}

TEST(RetryOnOom, TellsWhatTheErrorSaidWithoutItsStackTrace) {
    Trial trial{.failures = 1};
    trial.run({trial.frees("first", 1)});
    EXPECT_EQ(trial.message, "asked for 7 bytes");
}

TEST(RetryOnOom, PassesOnWhateverElseIsThrownWithoutUndoOrReclaim) {
    int calls = 0;
    const auto count = [&] { ++calls; };
    const auto retry = [&](const std::function<void()>& attempt) {
        retry_on_oom(
            {{[&] { return ++calls > 0; }}}, attempt, count, [&](const Reclaimer&, const std::string&) { ++calls; },
            [&](const std::string&) { ++calls; });
    };
    EXPECT_THROW(retry([] { throw std::runtime_error("disk"); }), std::runtime_error);
    EXPECT_THROW(retry([] { throw 7; }), int);
    EXPECT_THROW(retry([] { throw std::bad_alloc(); }), std::bad_alloc);
    test::expect_usage_error({"wrong"}, [&] { retry([] { throw Error(ErrorKind::usage, "wrong"); }); });
    EXPECT_THROW(retry([] { TORCH_CHECK(false, "shapes"); }), c10::Error);
    EXPECT_EQ(calls, 0);
}

TEST(RetryOnOom, AnErrorOfUndoOrOfAReclaimerPassesThrough) {
    const auto retry = [](const std::function<void()>& undo, const std::function<bool()>& reclaim) {
        retry_on_oom(
            {{reclaim}}, [] { run_out(); }, undo, [](const Reclaimer&, const std::string&) {},
            [](const std::string&) { throw std::logic_error("given up"); });
    };
    EXPECT_THROW(retry([] { throw std::runtime_error("undo"); }, [] { return true; }), std::runtime_error);
    EXPECT_THROW(retry([] {}, []() -> bool { throw std::runtime_error("reclaim"); }), std::runtime_error);
    EXPECT_THROW(retry([] {}, [] { return false; }), std::logic_error);
}

/// An exception that keeps memory alive, as torch's keep an operator's tensors.
struct Holding {
    at::Tensor tensor = at::empty({1 << 20});
};

class Reclaim : public ::testing::Test {
protected:
    static void SetUpTestSuite() { install_budget_allocator(); }
};

TEST_F(Reclaim, TheExceptionIsGoneBeforeAnythingIsUndoneOrReclaimed) {
    static bool takes_it = false;
    register_oom_test([](const std::exception_ptr& failure) {
        try {
            std::rethrow_exception(failure);
        } catch (const Holding&) {
            return takes_it;
        } catch (...) {
            return false;
        }
    });
    takes_it = true;
    const std::int64_t live = memory_use().live_bytes;
    std::vector<std::int64_t> seen;
    int failures = 1;
    const auto look = [&] { seen.push_back(memory_use().live_bytes - live); };
    retry_on_oom(
        {{[&] {
            look();
            return true;
        }}},
        [&] {
            look();
            if (failures-- > 0) throw Holding();
        },
        look, [&](const Reclaimer&, const std::string&) { look(); },
        [](const std::string&) { throw std::logic_error("given up"); });
    EXPECT_EQ(seen, (std::vector<std::int64_t>(5, 0)));
    takes_it = false;
    EXPECT_THROW(unless_oom([] { throw Holding(); }), Holding);
}

TEST_F(Reclaim, EmptiesTheCachesWhereSomethingWasFreed) {
    const auto cache_some = [] { at::empty({1 << 20}); };
    cache_some();
    EXPECT_GT(memory_use().cached_bytes, 0);
    EXPECT_EQ(reclaim({}), nullptr);
    EXPECT_EQ(reclaim({{[] { return false; }}}), nullptr);
    EXPECT_GT(memory_use().cached_bytes, 0);
    const Reclaimers reclaimers{{[] { return false; }}, {[] { return true; }}};
    EXPECT_EQ(reclaim(reclaimers), &reclaimers[1]);
    EXPECT_EQ(memory_use().cached_bytes, 0);
}

TEST_F(Reclaim, ABudgetThatIsUsedUpIsOutOfMemoryAndLeavesNothing) {
    const std::int64_t live = memory_use().live_bytes;
    std::string message;
    {
        const BudgetScope budget(live + 1000);
        EXPECT_FALSE(unless_oom([] { return at::empty({1 << 20}); }, &message));
        EXPECT_EQ(memory_use().live_bytes, live);
    }
    EXPECT_FALSE(message.empty());
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
    EXPECT_TRUE(unless_oom([] { return at::empty({1 << 20}); }));
    EXPECT_TRUE(unless_oom([] {}));
}

std::exception_ptr thrown(const std::function<void()>& call) {
    try {
        call();
    } catch (...) {
        return std::current_exception();
    }
    return nullptr;
}

TEST(IsOom, IsTorchsErrorAndWhatARegisteredTestTakesForOne) {
    struct Foreign {
        bool memory;
    };
    const auto foreign = [](bool memory) { return thrown([memory] { throw Foreign{memory}; }); };
    EXPECT_TRUE(is_oom(thrown([] { run_out(); })));
    EXPECT_FALSE(is_oom(thrown([] { throw std::bad_alloc(); })));
    EXPECT_FALSE(is_oom(thrown([] { TORCH_CHECK(false, "out of memory"); })));
    EXPECT_FALSE(is_oom(foreign(true)));
    register_oom_test([](const std::exception_ptr& failure) {
        try {
            std::rethrow_exception(failure);
        } catch (const Foreign& error) {
            return error.memory;
        } catch (...) {
            return false;
        }
    });
    EXPECT_TRUE(is_oom(foreign(true)));
    EXPECT_FALSE(is_oom(foreign(false)));
    EXPECT_FALSE(is_oom(thrown([] { throw std::runtime_error("disk"); })));
    int failures = 1, undone = 0;
    retry_on_oom(
        {{[] { return true; }}},
        [&] {
            if (failures-- > 0) throw Foreign{true};
        },
        [&] { ++undone; }, [](const Reclaimer&, const std::string&) {},
        [](const std::string&) { throw std::logic_error("given up"); });
    EXPECT_EQ(undone, 1);
}

TEST(IsOom, SaysWhatAnExceptionOfAnyKindSays) {
    EXPECT_EQ(message_of(thrown([] { throw std::runtime_error("disk"); })), "disk");
    EXPECT_EQ(message_of(thrown([] { TORCH_CHECK(false, "shapes"); })), "shapes");
    EXPECT_EQ(message_of(thrown([] { throw 7; })), "an exception of unknown type");
}

}  // namespace
}  // namespace microbatch
