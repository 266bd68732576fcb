#pragma once

#include <cstdint>
#include <span>

#include "microbatch/data/batch.h"

namespace microbatch {

/// Samples that can be fetched by index. Derive from it to train on data of your own.
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

    /// Tokens (or, for images, samples: 1) that one sample counts for in speeds and intervals.
    virtual std::int64_t tokens_per_sample() const { return 1; }

    /// The sample that takes the most memory: plans are made for it. 0 where all samples have the same shape.
    virtual std::int64_t longest_sample() const { return 0; }

    /// The samples at these indices, in this order, as freshly allocated tensors on the CPU.
    /// Requires: every index in [0, size()); an implementation may throw std::out_of_range otherwise.
    virtual Batch get(std::span<const std::int64_t> indices) const = 0;
};

}  // namespace microbatch
