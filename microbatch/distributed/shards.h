#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "microbatch/model/parameters.h"

namespace microbatch {

/// Which rank updates which parameter (ZeRO-1): whole tensors, each given to the rank that has the fewest bytes so far. A
/// parameter stays with its rank, also when others are added.
///
/// Bound: a rank has at most 1/n of the bytes and the largest tensor; so it is, too, of those that require a gradient.
/// Source: Rajbhandari et al. 2020, arXiv:1910.02054 (P_os). Deviation: whole tensors; the greedy rule of Graham 1966.
class Shards {
public:
    explicit Shards(int ranks) : bytes_(static_cast<std::size_t>(ranks)) {}

    /// Gives those that have no rank yet to one: first those that require a gradient. All ranks, with the same parameters.
    void add(const Parameters& parameters);

    /// The rank of a parameter that was added.
    int of(const at::Tensor& parameter) const { return ranks_.at(parameter.unsafeGetTensorImpl()); }

private:
    void add(const at::Tensor& parameter);

    std::unordered_map<const void*, int> ranks_;
    std::vector<std::int64_t> bytes_;  // of each rank
};

}  // namespace microbatch
