#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <unordered_map>
#include <vector>

namespace microbatch {

/// Which rank updates which parameter (ZeRO-1): whole tensors, the largest first, each given to the rank that has the
/// fewest bytes so far. A parameter stays with its rank, also when others are added.
///
/// Bound: a rank has at most 1/n of the bytes and the largest tensor; so it is, too, of those that require a gradient.
/// Source: Rajbhandari et al. 2020, arXiv:1910.02054 (P_os). Deviation: whole tensors; the greedy rule of Graham 1966.
class Shards {
public:
    explicit Shards(int ranks) : bytes_(static_cast<std::size_t>(ranks)) {}

    /// Gives those that have no rank yet to one: first those that require a gradient. All ranks, with the same parameters.
    void add(std::vector<at::Tensor> parameters);

    bool has(const at::Tensor& parameter) const { return ranks_.contains(parameter.unsafeGetTensorImpl()); }

    /// The rank of a parameter; 0 if it was not added.
    int of(const at::Tensor& parameter) const {
        const auto found = ranks_.find(parameter.unsafeGetTensorImpl());
        return found == ranks_.end() ? 0 : found->second;
    }

private:
    std::unordered_map<const void*, int> ranks_;
    std::vector<std::int64_t> bytes_;  // of each rank
};

}  // namespace microbatch
