#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "microbatch/data/batch.h"

namespace microbatch {

/// Samples that can be loaded by index. Derive from it to train on your own data.
///
/// Threads: const calls may overlap.
class Dataset {
public:
    Dataset() = default;
    Dataset(const Dataset&) = delete;
    Dataset& operator=(const Dataset&) = delete;
    virtual ~Dataset() = default;

    /// Number of samples.
    virtual std::int64_t size() const = 0;

    /// The number of tokens (for images: 1) that one sample counts as in speeds and intervals.
    virtual std::int64_t tokens_per_sample() const { return 1; }

    /// The sample that takes the most memory, for which plans are made. 0 if all samples have the same shape.
    virtual std::int64_t longest_sample() const { return 0; }

    /// The length of a sample, if micro-batches are to be bounded by tokens: with arrange(), which puts the longest first.
    virtual std::int64_t length(std::int64_t /*index*/) const { return 1; }

    /// Called with the samples of a run's next batch, before any of them is loaded: may put them in another order, which
    /// is free within a batch, and begin to load them. The same for the same indices.
    virtual void arrange(std::vector<std::int64_t>& /*batch*/) const {}

    /// The samples at these indices, in this order, as freshly allocated tensors on the CPU.
    /// Requires: every index in [0, size()); an implementation may throw std::out_of_range otherwise.
    virtual Batch get(std::span<const std::int64_t> indices) const = 0;
};

}  // namespace microbatch
