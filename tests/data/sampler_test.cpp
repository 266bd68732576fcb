#include "microbatch/data/sampler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <limits>
#include <map>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "support/errors.h"

namespace microbatch {
namespace {

using test::expect_usage_error;

using Indices = std::vector<std::int64_t>;
constexpr std::int64_t largest = std::numeric_limits<std::int64_t>::max();

Sampler sampler_at(std::int64_t size, const SamplerState& state) {
    Sampler sampler(size, 0);
    sampler.restore(state);
    return sampler;
}

Indices sorted(Indices indices) {
    std::sort(indices.begin(), indices.end());
    return indices;
}

/// Pearson's statistic of the counts against equal chances for `cells` outcomes.
double chi_square(const std::map<Indices, std::int64_t>& counts, std::size_t cells, std::int64_t trials) {
    const double expected = static_cast<double>(trials) / static_cast<double>(cells);
    double sum = expected * static_cast<double>(cells - counts.size());  // outcomes never seen
    for (const auto& [outcome, count] : counts) {
        const double difference = static_cast<double>(count) - expected;
        sum += difference * difference / expected;
    }
    return sum;
}

/// How often the first `length` indices from `state` take each value, over the seeds [0, trials).
std::map<Indices, std::int64_t> count_beginnings(std::int64_t size, SamplerState state, std::int64_t length,
                                                 std::int64_t trials) {
    std::map<Indices, std::int64_t> counts;
    for (std::int64_t seed = 0; seed < trials; ++seed) {
        state.seed = static_cast<std::uint64_t>(seed);
        ++counts[sampler_at(size, state).next(length)];
    }
    return counts;
}

TEST(Sampler, EveryEpochIsAPermutation) {
    for (const std::int64_t size : {1, 2, 3, 4, 5, 6, 7, 15, 16, 17, 63, 64, 65, 255, 256, 257, 1000, 4097, 65'537}) {
        Indices everything(static_cast<std::size_t>(size));
        std::iota(everything.begin(), everything.end(), 0);
        for (const std::uint64_t seed : {std::uint64_t{0}, std::uint64_t{1}, ~std::uint64_t{0}}) {
            Sampler sampler(size, seed);
            for (int epoch = 0; epoch < 3; ++epoch) EXPECT_EQ(sorted(sampler.next(size)), everything) << size;
        }
    }
}

TEST(Sampler, GivesTheseIndices) {
    // From a Python program that computes the construction described in sampler.cpp on its own. If these change, every
    // run that is resumed sees other data than it would have.
    EXPECT_EQ(Sampler(10, 42).next(20), (Indices{7, 2, 4, 3, 0, 5, 8, 6, 1, 9, 0, 1, 9, 5, 3, 7, 6, 8, 4, 2}));
    EXPECT_EQ(Sampler(1'000'000'007, 42).next(4), (Indices{726'146'657, 333'759'702, 835'842'940, 34'944'356}));
    EXPECT_EQ(Sampler(largest, 42).next(3),
              (Indices{2'653'055'274'703'314'194, 8'685'893'645'237'412'536, 6'697'396'737'902'793'887}));
    const SamplerState near_the_end{.seed = ~std::uint64_t{0}, .epoch = 3, .position = 49'998};
    EXPECT_EQ(sampler_at(50'000, near_the_end).next(4), (Indices{7'491, 9'253, 14'234, 20'612}));
}

TEST(Sampler, EpochsAndSeedsHaveOrdersOfTheirOwn) {
    Sampler sampler(1'000, 1);
    std::vector<Indices> orders{sampler.next(1'000), sampler.next(1'000), sampler.next(1'000)};
    for (const std::uint64_t seed : {0, 2, 3}) orders.push_back(Sampler(1'000, seed).next(1'000));
    for (std::size_t i = 0; i < orders.size(); ++i) {
        for (std::size_t j = 0; j < i; ++j) {
            std::size_t same = 0;
            for (std::size_t k = 0; k < 1'000; ++k) same += orders[i][k] == orders[j][k] ? 1 : 0;
            // Random orders agree in a Poisson(1) number of places: more than 12 has a chance of 6e-11.
            EXPECT_LE(same, 12U) << i << " and " << j;
        }
    }
}

TEST(Sampler, TwoRequestsAreTheSameAsOneOfTheirSum) {
    std::mt19937_64 random(1);
    for (int trial = 0; trial < 300; ++trial) {
        const auto size = static_cast<std::int64_t>(1 + random() % 40);
        const auto first = static_cast<std::int64_t>(random() % 100);
        const auto second = static_cast<std::int64_t>(random() % 100);
        Sampler apart(size, random());
        Sampler together = apart;
        Indices joined = apart.next(first);
        const Indices rest = apart.next(second);
        joined.insert(joined.end(), rest.begin(), rest.end());
        EXPECT_EQ(joined, together.next(first + second));
        EXPECT_EQ(apart.state(), together.state());
    }
}

TEST(Sampler, ARequestPastTheEndOfAnEpochDropsNoSample) {
    Sampler sampler(10, 7);
    std::map<std::int64_t, int> seen;
    for (int batch = 0; batch < 10; ++batch) {
        for (const std::int64_t index : sampler.next(7)) ++seen[index];
    }
    ASSERT_EQ(seen.size(), 10U);
    for (const auto& [index, times] : seen) EXPECT_EQ(times, 7) << index;  // 70 samples: 7 epochs of 10
    EXPECT_EQ(sampler.state(), (SamplerState{.seed = 7, .epoch = 7, .position = 0}));
}

TEST(Sampler, StateCountsEpochsAndPositions) {
    Sampler sampler(10, 7);
    EXPECT_EQ(sampler.state(), (SamplerState{.seed = 7, .epoch = 0, .position = 0}));
    sampler.next(9);
    EXPECT_EQ(sampler.state(), (SamplerState{.seed = 7, .epoch = 0, .position = 9}));
    sampler.next(25);
    EXPECT_EQ(sampler.state(), (SamplerState{.seed = 7, .epoch = 3, .position = 4}));
    EXPECT_EQ(sampler.next(0), Indices{});
    EXPECT_EQ(sampler.state(), (SamplerState{.seed = 7, .epoch = 3, .position = 4}));
}

TEST(Sampler, ContinuesFromARestoredState) {
    std::mt19937_64 random(2);
    for (int trial = 0; trial < 100; ++trial) {
        const auto size = static_cast<std::int64_t>(1 + random() % 50);
        Sampler sampler(size, random());
        sampler.next(static_cast<std::int64_t>(random() % 200));
        Sampler resumed = sampler_at(size, sampler.state());
        EXPECT_EQ(resumed.next(130), sampler.next(130));
    }
}

TEST(Sampler, EverySampleComesFirstEquallyOften) {
    // Quantiles of chi-square: an ideal shuffle would fail each with a chance of 1e-6, had the seeds been drawn.
    struct Case {
        std::int64_t size;
        double quantile;
    };
    for (const Case& each : {Case{2, 23.93}, Case{3, 27.63}, Case{7, 38.26}, Case{10, 44.81}, Case{100, 180.79}}) {
        const std::int64_t trials = 500 * each.size;
        const auto cells = static_cast<std::size_t>(each.size);
        for (const SamplerState& state : {SamplerState{}, SamplerState{.epoch = 1}, SamplerState{.position = 1},
                                          SamplerState{.epoch = 77, .position = each.size - 1}}) {
            EXPECT_LT(chi_square(count_beginnings(each.size, state, 1, trials), cells, trials), each.quantile)
                << each.size << " samples, epoch " << state.epoch << ", position " << state.position;
        }
    }
}

TEST(Sampler, OrdersOfFewAndPairsOfManySamplesAreEquallyLikely) {
    // As above, 1e-6: all 6 and 24 orders; all 90 first pairs of 10 (8 rounds instead of 12 fail at 24: 114).
    EXPECT_LT(chi_square(count_beginnings(3, {}, 3, 240'000), 6, 240'000), 35.89);
    EXPECT_LT(chi_square(count_beginnings(4, {}, 4, 960'000), 24, 960'000), 70.55);
    EXPECT_LT(chi_square(count_beginnings(10, {}, 2, 90'000), 90, 90'000), 167.35);
}

TEST(Sampler, ConsecutiveEpochsOfOneSeedAreIndependent) {
    // The first index of an epoch and of the next, over 100,000 epochs: 99 degrees of freedom, chance 1e-6.
    std::map<Indices, std::int64_t> counts;
    Sampler sampler(10, 3);
    std::int64_t previous = sampler.next(10).front();
    for (int epoch = 0; epoch < 100'000; ++epoch) {
        const std::int64_t first = sampler.next(10).front();
        ++counts[{previous, first}];
        previous = first;
    }
    EXPECT_LT(chi_square(counts, 100, 100'000), 180.79);
}

TEST(Sampler, RefusesInvalidSizesAndCounts) {
    expect_usage_error({"a sampler over a data set of 0 samples"}, [] { Sampler(0, 1); });
    expect_usage_error({"a sampler over a data set of -5 samples"}, [] { Sampler(-5, 1); });
    Sampler sampler(10, 1);
    expect_usage_error({"asked for -1 samples"}, [&] { sampler.next(-1); });
    EXPECT_THROW(sampler.next(largest), std::length_error);
    EXPECT_EQ(sampler.state(), (SamplerState{.seed = 1}));
}

TEST(Sampler, RefusesAStateOutsideTheDataAndIsUnchanged) {
    Sampler sampler(10, 1);
    sampler.next(3);
    const SamplerState before = sampler.state();
    for (const SamplerState& bad :
         {SamplerState{.position = 10}, SamplerState{.position = -1}, SamplerState{.epoch = -1}}) {
        expect_usage_error({"the data set has 10 samples"}, [&] { sampler.restore(bad); });
        EXPECT_EQ(sampler.state(), before);
    }
}

TEST(Sampler, TheLastEpochThatCanBeCountedEndsInAnError) {
    Sampler sampler = sampler_at(2, {.seed = 1, .epoch = largest, .position = 0});
    EXPECT_EQ(sampler.next(1).size(), 1U);
    const SamplerState before = sampler.state();
    expect_usage_error({"is the last one that fits in 64 bits"}, [&] { sampler.next(1); });
    EXPECT_EQ(sampler.state(), before);
}

}  // namespace
}  // namespace microbatch
