#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "microbatch/core/batch_plan.h"
#include "microbatch/data/batch.h"

namespace microbatch {

/// A plan that samples of a shape, or of a larger one, had to be cut down to.
struct MicroBatchCap {
    std::vector<std::vector<std::int64_t>> shape;  ///< of one sample, field by field
    Plan plan;
};

/// The plans that batches of some shapes had to be cut down to.
class MicroBatchCaps {
public:
    /// Batches whose samples have this shape, or a larger one, are run by no larger plan from now on.
    void remember(const Batch& batch, const Plan& plan);

    /// The plan, or what was remembered of such samples where that is smaller.
    Plan within(const Plan& plan, const Batch& batch) const;

    void clear() { limits_.clear(); }

    const std::vector<MicroBatchCap>& all() const { return limits_; }
    void restore(std::vector<MicroBatchCap> limits) { limits_ = std::move(limits); }

private:
    using Shape = decltype(MicroBatchCap::shape);

    static Shape shape_of(const Batch& batch);
    static bool covers(const Shape& smaller, const Shape& larger);

    std::vector<MicroBatchCap> limits_;
};

}  // namespace microbatch
