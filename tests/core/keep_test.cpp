// What an exact batch keeps of a forward: enough to differentiate every segment, and with keep_least as little as that
// takes. Both are functions of a program alone, which a simulator runs here.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <set>
#include <vector>

#include "microbatch/core/keep.h"

namespace microbatch {
namespace {

using Values = std::vector<std::int32_t>;

/// Builds a program: each call is an operator, which uses some values and makes one.
class ProgramWriter {
public:
    std::int32_t op(const Values& uses, std::int64_t bytes = 1) { return add(uses, bytes, next_storage_++); }

    std::int32_t barrier(std::int32_t use, std::int64_t bytes = 1) {
        program.barriers.push_back(program.operators);
        return op({use}, bytes);
    }

    /// Another value on the same memory.
    std::int32_t view(std::int32_t of) { return add({of}, at(of).bytes, at(of).storage); }

    /// Changes a value in place: what was there is gone.
    std::int32_t change(std::int32_t value) {
        at(value).overwritten = true;
        return view(value);
    }

    Program program = {.fingerprint = 5};

private:
    ProgramValue& at(std::int32_t value) { return program.values[static_cast<std::size_t>(value)]; }

    std::int32_t add(const Values& uses, std::int64_t bytes, std::int32_t storage) {
        for (const std::int32_t use : std::set<std::int32_t>(uses.begin(), uses.end())) {
            at(use).used_by.push_back(program.operators);
        }
        program.values.push_back({.made_by = program.operators++, .storage = storage, .bytes = bytes});
        return static_cast<std::int32_t>(program.values.size()) - 1;
    }

    std::int32_t next_storage_ = 0;
};

/// Layers of a convolution, a barrier and an activation, with a branch around every `block` of them; 0: none.
Program chain(int layers, int block, std::int64_t bytes = 10) {
    ProgramWriter writer;
    std::int32_t x = writer.op({}, bytes), branch = x;
    for (int i = 0; i < layers; ++i) {
        x = writer.op({writer.barrier(writer.op({x}, bytes), bytes)}, bytes);
        if (block > 0 && (i + 1) % block == 0) {
            x = writer.op({x, branch}, bytes);
            branch = x;
        }
    }
    writer.op({x});
    return writer.program;
}

Program random_program(std::uint32_t seed) {
    std::mt19937 random(seed);
    const auto below = [&](std::size_t most) { return static_cast<std::int32_t>(random() % most); };
    ProgramWriter writer;
    std::int32_t last = writer.op({}, 5);
    const int operators = 3 + below(40);
    for (int i = 0; i < operators; ++i) {
        const auto any = [&] { return std::max(0, last - below(6)); };
        const std::int64_t bytes = 1 + below(20);
        switch (below(6)) {
            case 0:
                last = writer.barrier(last, bytes);
                break;
            case 1:
                last = writer.view(any());
                break;
            case 2:
                last = writer.change(last);
                break;
            default:
                last = writer.op({last, any()}, bytes);
        }
    }
    return writer.program;
}

/// Runs the way back of a program with a Keep: what is held, and how often each operator runs.
class Simulator {
public:
    Simulator(const Program& program, const Keep& keep)
        : program_(program),
          keep_(keep),
          barriers_(static_cast<std::int32_t>(program.barriers.size())),
          runs_(static_cast<std::size_t>(program.operators), 1) {}

    void run() {
        ASSERT_EQ(keep_.fingerprint, program_.fingerprint);
        ASSERT_EQ(keep_.forward.size(), program_.values.size());
        ASSERT_EQ(keep_.before.size(), program_.barriers.size() + 1);
        for (std::size_t i = 0; i < program_.values.size(); ++i) {
            if (keep_.forward[i]) kept_.insert(static_cast<std::int32_t>(i));
        }
        measure();
        for (std::int32_t segment = barriers_; segment >= 0; --segment) {
            const Values& before = keep_.before[static_cast<std::size_t>(segment)];
            compute(before);
            kept_.insert(before.begin(), before.end());
            measure();
            const std::set<std::int32_t> needs = needs_of(segment);
            compute({needs.begin(), needs.end()});
            for (std::int32_t op = begin(segment); op < end(segment); ++op) ++runs_[static_cast<std::size_t>(op)];
            // With the gradient at the barrier, what was made between it and the one before is not needed any more.
            const std::int32_t done = begin(std::max(segment - 1, 0));
            std::erase_if(kept_, [&](std::int32_t value) { return made_by(value) >= done; });
        }
    }

    std::int64_t peak() const { return peak_; }
    int most_runs() const { return *std::max_element(runs_.begin(), runs_.end()); }
    bool computed_nothing() const { return !computed_; }

private:
    std::int32_t made_by(std::int32_t value) const { return program_.values[static_cast<std::size_t>(value)].made_by; }
    std::int32_t begin(std::int32_t segment) const {
        return segment == 0 ? 0 : program_.barriers[static_cast<std::size_t>(segment - 1)];
    }
    std::int32_t end(std::int32_t segment) const {
        return segment == barriers_ ? program_.operators : begin(segment + 1);
    }

    bool is_used_by(std::int32_t value, std::int32_t op) const {
        const auto& uses = program_.values[static_cast<std::size_t>(value)].used_by;
        return std::find(uses.begin(), uses.end(), op) != uses.end();
    }

    std::set<std::int32_t> needs_of(std::int32_t segment) const {
        std::set<std::int32_t> needs;
        for (std::size_t i = 0; i < program_.values.size(); ++i) {
            const auto value = static_cast<std::int32_t>(i);
            if (made_by(value) >= begin(segment)) continue;
            for (std::int32_t op = begin(segment); op < end(segment); ++op) {
                if (is_used_by(value, op)) needs.insert(value);
            }
        }
        return needs;
    }

    // Every operator that leads to them from what is kept runs once more.
    void compute(const Values& wanted) {
        std::set<std::int32_t> missing(wanted.begin(), wanted.end());
        std::set<std::int32_t> ops;
        while (!missing.empty()) {
            const std::int32_t value = *missing.begin();
            missing.erase(missing.begin());
            if (kept_.contains(value) || !ops.insert(made_by(value)).second) continue;
            computed_ = true;
            ++runs_[static_cast<std::size_t>(made_by(value))];
            for (std::size_t i = 0; i < program_.values.size(); ++i) {
                if (is_used_by(static_cast<std::int32_t>(i), made_by(value)))
                    missing.insert(static_cast<std::int32_t>(i));
            }
        }
    }

    void measure() {
        std::set<std::int32_t> storages;
        std::int64_t bytes = 0;
        for (const std::int32_t i : kept_) {
            const ProgramValue& value = program_.values[static_cast<std::size_t>(i)];
            if (value.overwritten || storages.insert(value.storage).second) bytes += value.bytes;
        }
        peak_ = std::max(peak_, bytes);
    }

    const Program& program_;
    const Keep& keep_;
    std::int32_t barriers_;
    std::vector<int> runs_;
    std::set<std::int32_t> kept_;
    std::int64_t peak_ = 0;
    bool computed_ = false;
};

Values kept_of(const Keep& keep) {
    Values kept;
    for (std::size_t i = 0; i < keep.forward.size(); ++i) {
        if (keep.forward[i]) kept.push_back(static_cast<std::int32_t>(i));
    }
    return kept;
}

struct Simulated {
    std::int64_t all = 0, least = 0;  ///< peaks
    int all_runs = 0, least_runs = 0;
};

Simulated simulated(const Program& program) {
    const Keep all = keep_all(program), least = keep_least(program);
    Simulator of_all(program, all), of_least(program, least);
    of_all.run();
    of_least.run();
    EXPECT_TRUE(of_all.computed_nothing());
    return {of_all.peak(), of_least.peak(), of_all.most_runs(), of_least.most_runs()};
}

TEST(Keep, HasNothingToDoWithoutBarriers) {
    ProgramWriter writer;
    writer.op({writer.op({})});
    for (const Keep& keep : {keep_all(writer.program), keep_least(writer.program)}) {
        EXPECT_EQ(kept_of(keep), Values{});
        EXPECT_EQ(keep.before, std::vector<Values>(1));
        EXPECT_EQ(keep.fingerprint, 5U);
    }
    const Program empty;
    EXPECT_EQ(kept_of(keep_all(empty)), Values{});
    EXPECT_EQ(kept_of(keep_least(empty)), Values{});
}

TEST(Keep, AllKeepsWhatPassesABarrier) {
    ProgramWriter writer;
    const std::int32_t data = writer.op({}), unused = writer.op({data}), branch = writer.op({data});
    const std::int32_t x = writer.op({branch}), y = writer.barrier(x), z = writer.op({y});
    writer.op({writer.barrier(z), branch});
    EXPECT_EQ(kept_of(keep_all(writer.program)), (Values{branch, x, z}));
    EXPECT_GT(unused, data);
    EXPECT_EQ(keep_all(writer.program).before, std::vector<Values>(3));
}

TEST(Keep, AllRunsEverySegmentTwice) {
    for (const int block : {0, 1, 2, 3}) EXPECT_EQ(simulated(chain(12, block)).all_runs, 2);
}

TEST(Keep, LeastRunsNothingMoreThanThreeTimes) {
    for (const int layers : {1, 2, 3, 8, 20, 50}) {
        for (const int block : {0, 1, 2, 3}) EXPECT_LE(simulated(chain(layers, block)).least_runs, 3);
    }
    for (std::uint32_t seed = 0; seed < 500; ++seed) {
        EXPECT_LE(simulated(random_program(seed)).least_runs, 3) << "seed " << seed;
    }
}

TEST(Keep, LeastNeverHoldsMoreThanAll) {
    for (const int layers : {1, 2, 3, 8, 20, 50}) {
        for (const int block : {0, 1, 2, 3}) {
            const Simulated found = simulated(chain(layers, block));
            EXPECT_LE(found.least, found.all) << layers << " layers, blocks of " << block;
        }
    }
    for (std::uint32_t seed = 0; seed < 500; ++seed) {
        const Simulated found = simulated(random_program(seed));
        EXPECT_LE(found.least, found.all) << "seed " << seed;
    }
}

TEST(Keep, LeastHoldsAboutTwiceTheRootOfAChain) {
    for (const int layers : {16, 49, 100}) {
        const Simulated found = simulated(chain(layers, 0));
        EXPECT_EQ(found.all, 10 * layers);
        // With k places of 10 bytes each, layers / k values between two of them: at best 2 sqrt(layers).
        EXPECT_LE(found.least, static_cast<std::int64_t>(10.0 * (2.0 * std::sqrt(layers) + 2.0)));
    }
}

TEST(Keep, LeastChoosesPlacesWhereLittleIsAlive) {
    ProgramWriter writer;
    std::int32_t x = writer.op({}, 1000);
    for (int i = 0; i < 9; ++i) {
        const std::int32_t small = writer.op({x}, 1);
        x = writer.op({writer.barrier(writer.op({small}, 1000), 1000)}, 1000);
    }
    writer.op({x});
    const Keep least = keep_least(writer.program);
    for (const std::int32_t value : kept_of(least)) {
        EXPECT_EQ(writer.program.values[static_cast<std::size_t>(value)].bytes, 1);
    }
    const Simulated found = simulated(writer.program);
    EXPECT_LE(found.least, 1009);
    EXPECT_EQ(found.all, 9000);
}

TEST(Keep, CountsSharedMemoryOnce) {
    ProgramWriter writer;
    const std::int32_t x = writer.op({}, 100), view = writer.view(x);
    const std::int32_t y = writer.barrier(x, 100);
    writer.op({y, view});
    EXPECT_EQ(kept_of(keep_all(writer.program)), (Values{x, view}));
    EXPECT_EQ(simulated(writer.program).all, 100);
}

TEST(Keep, CountsACopyOfWhatIsOverwritten) {
    ProgramWriter writer;
    const std::int32_t x = writer.op({}, 100), y = writer.barrier(x, 100);
    const std::int32_t z = writer.change(y);
    writer.op({writer.barrier(writer.op({z}, 100)), z});
    EXPECT_EQ(kept_of(keep_all(writer.program)).front(), x);
    EXPECT_GE(simulated(writer.program).all, 300);
}

TEST(Keep, IsTheSameEveryTime) {
    for (std::uint32_t seed = 0; seed < 50; ++seed) {
        const Program program = random_program(seed);
        EXPECT_EQ(keep_least(program).forward, keep_least(program).forward);
        EXPECT_EQ(keep_least(program).before, keep_least(program).before);
    }
}

TEST(Keep, TakesLongProgramsInLittleTime) {
    const Simulated found = simulated(chain(150, 2));
    EXPECT_LT(found.least, found.all / 2);
}

}  // namespace
}  // namespace microbatch
