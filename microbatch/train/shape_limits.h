#pragma once

#include <vector>

#include "microbatch/core/batch_plan.h"
#include "microbatch/train/batch.h"

namespace microbatch {

/// The plans that batches of some shapes had to be cut down to.
class ShapeLimits {
public:
    /// Batches whose samples have this shape, or a larger one, are run by no larger plan from now on.
    void remember(const Batch& batch, const Plan& plan);

    /// The plan, or what was remembered of such samples where that is smaller.
    Plan within(const Plan& plan, const Batch& batch) const;

    void clear() { limits_.clear(); }

private:
    using Shape = std::vector<std::vector<std::int64_t>>;  // of one sample, field by field

    struct Limit {
        Shape shape;
        Plan plan;
    };

    static Shape shape_of(const Batch& batch);
    static bool covers(const Shape& smaller, const Shape& larger);

    std::vector<Limit> limits_;
};

}  // namespace microbatch
