#include "microbatch/data/sampler.h"

#include <array>
#include <limits>

#include "microbatch/core/error.h"

namespace microbatch {
namespace {

/// splitmix64's finaliser: every bit of the result depends on every bit of the input.
/// Source: Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators", OOPSLA; constants of Stafford's
///         variant 13, as in Vigna's splitmix64.c.
std::uint64_t mixed(std::uint64_t value) {
    value = (value ^ (value >> 30U)) * 0xbf58476d1ce4e5b9ULL;
    value = (value ^ (value >> 27U)) * 0x94d049bb133111ebULL;
    return value ^ (value >> 31U);
}

/// The permutation of [0, size) that belongs to a seed and an epoch.
///
/// A balanced Feistel network is a permutation of [0, 4^half_bits), whatever its round function; applying it again
/// until the result is below size makes it one of [0, size) (cycle walking, fewer than 4 turns on average because
/// 4^half_bits < 4 size, but for size 1). A known limit: on more than 4 numbers a Feistel network only makes even
/// permutations, so of all orders of exactly 4^k samples it reaches half.
/// Source: Luby & Rackoff 1988, "How to construct pseudorandom permutations"; Black & Rogaway 2002, "Ciphers with
///         arbitrary finite domains".
class EpochOrder {
public:
    EpochOrder(std::uint64_t size, std::uint64_t seed, std::uint64_t epoch) : size_(size) {
        while (half_bits_ < 32 && (size - 1) >> (2 * half_bits_) != 0) ++half_bits_;
        // splitmix64's own stream, begun at a point that differs for every seed and epoch.
        std::uint64_t counter = mixed(seed) + epoch;
        for (std::uint64_t& key : keys_) key = mixed(counter += 0x9e3779b97f4a7c15ULL);
    }

    std::int64_t at(std::int64_t position) const {
        auto index = static_cast<std::uint64_t>(position);
        do {
            index = permuted(index);
        } while (index >= size_);
        return static_cast<std::int64_t>(index);
    }

private:
    std::uint64_t permuted(std::uint64_t index) const {
        const std::uint64_t mask = (std::uint64_t{1} << half_bits_) - 1;
        std::uint64_t left = index >> half_bits_;
        std::uint64_t right = index & mask;
        for (const std::uint64_t key : keys_) {
            const std::uint64_t next = left ^ (mixed(right + key) & mask);
            left = right;
            right = next;
        }
        return left << half_bits_ | right;
    }

    std::uint64_t size_;
    unsigned half_bits_ = 1;
    // Four rounds are enough for large domains; with 8, samples in a domain of 16 still follow each other unevenly.
    std::array<std::uint64_t, 12> keys_{};
};

}  // namespace

Sampler::Sampler(std::int64_t dataset_size, std::uint64_t seed) : size_(dataset_size), state_{.seed = seed} {
    if (dataset_size < 1) {
        throw Error(ErrorKind::usage, "a sampler over a data set of ", dataset_size, " samples; it needs at least 1");
    }
}

std::vector<std::int64_t> Sampler::next(std::int64_t count) {
    if (count < 0) throw Error(ErrorKind::usage, "asked for ", count, " samples; the number must be 0 or more");
    std::vector<std::int64_t> indices;
    indices.reserve(static_cast<std::size_t>(count));
    SamplerState state = state_;
    const auto size = static_cast<std::uint64_t>(size_);
    EpochOrder order(size, state.seed, static_cast<std::uint64_t>(state.epoch));
    for (std::int64_t i = 0; i < count; ++i) {
        indices.push_back(order.at(state.position));
        if (++state.position < size_) continue;
        if (state.epoch == std::numeric_limits<std::int64_t>::max()) {
            throw Error(ErrorKind::usage, "epoch ", state.epoch, " is the last one that fits in 64 bits; restore ",
                        "an earlier state");
        }
        state.position = 0;
        ++state.epoch;
        order = EpochOrder(size, state.seed, static_cast<std::uint64_t>(state.epoch));
    }
    state_ = state;
    return indices;
}

void Sampler::restore(SamplerState state) {
    if (state.epoch < 0 || state.position < 0 || state.position >= size_) {
        throw Error(ErrorKind::usage, "cannot restore a sampler to epoch ", state.epoch, ", position ", state.position,
                    ": the data set has ", size_, " samples; restore a state from the same data");
    }
    state_ = state;
}

}  // namespace microbatch
