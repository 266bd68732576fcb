#include "microbatch/distributed/shards.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>

#include "microbatch/model/parameters.h"

namespace microbatch {
namespace {

Parameters parameters_of_sizes(const std::vector<std::int64_t>& sizes) {
    Parameters result;
    for (const std::int64_t size : sizes) {
        result.push_back({std::to_string(result.size()), at::empty({size}).set_requires_grad(true)});
    }
    return result;
}

std::vector<std::int64_t> bytes_of_ranks(const Shards& shards, const Parameters& parameters, int ranks) {
    std::vector<std::int64_t> bytes(static_cast<std::size_t>(ranks));
    for (const Parameter& one : parameters) {
        bytes[static_cast<std::size_t>(shards.of(one.tensor))] += static_cast<std::int64_t>(one.tensor.nbytes());
    }
    return bytes;
}

TEST(Shards, GiveNoRankMoreThanItsShareAndTheLargestTensor) {
    std::mt19937_64 random(1);
    for (int round = 0; round < 300; ++round) {
        const int ranks = 1 + static_cast<int>(random() % 9);
        std::vector<std::int64_t> sizes(random() % 40);
        for (std::int64_t& size : sizes) size = static_cast<std::int64_t>(random() % (round % 2 == 0 ? 10 : 5000));
        const Parameters parameters = parameters_of_sizes(sizes);
        Shards shards(ranks);
        shards.add(tensors_of(parameters));
        const auto bytes = bytes_of_ranks(shards, parameters, ranks);
        const std::int64_t total = 4 * std::accumulate(sizes.begin(), sizes.end(), std::int64_t{0});
        const std::int64_t largest = sizes.empty() ? 0 : 4 * *std::ranges::max_element(sizes);
        for (const std::int64_t one : bytes) EXPECT_LE(one, total / ranks + largest);
    }
}

TEST(Shards, KeepAParameterWithItsRankWhenOthersAreAdded) {
    Parameters parameters = parameters_of_sizes({3, 9, 1, 1, 1, 7});
    Shards shards(3);
    shards.add(tensors_of(parameters));
    std::vector<int> before;
    for (const Parameter& one : parameters) before.push_back(shards.of(one.tensor));
    for (Parameter& one : parameters_of_sizes({100, 2, 2})) parameters.push_back(std::move(one));
    shards.add(tensors_of(parameters));
    for (std::size_t i = 0; i < before.size(); ++i) EXPECT_EQ(shards.of(parameters[i].tensor), before[i]);
    const auto bytes = bytes_of_ranks(shards, parameters, 3);
    EXPECT_LE(*std::ranges::max_element(bytes), 4 * (126 / 3 + 100));
}

// A frozen model with a small part that is trained: that part is spread.
TEST(Shards, SpreadWhatIsTrained) {
    Parameters parameters = parameters_of_sizes({1000, 10, 1000, 10, 1000, 10});
    for (std::size_t i = 0; i < 6; i += 2) parameters[i].tensor.set_requires_grad(false);
    Shards shards(3);
    shards.add(tensors_of(parameters));
    EXPECT_NE(shards.of(parameters[1].tensor), shards.of(parameters[3].tensor));
    EXPECT_NE(shards.of(parameters[3].tensor), shards.of(parameters[5].tensor));
    EXPECT_NE(shards.of(parameters[1].tensor), shards.of(parameters[5].tensor));
}

}  // namespace
}  // namespace microbatch
