#pragma once

#include <cstdint>
#include <vector>

#include "microbatch/core/batch_plan.h"
#include "microbatch/data/batch.h"
#include "microbatch/state/stateful.h"

namespace microbatch {

/// The shape of one sample, field by field, without the dimension of the samples.
using SampleShape = std::vector<std::vector<std::int64_t>>;

SampleShape shape_of(const Batch& batch);

/// The smaller plans that samples of some shapes turned out to need when memory ran out.
class MicroBatchCaps final : public Stateful {
public:
    /// Samples of this shape, or of a larger one, are run by no larger plan from now on. An empty shape means all.
    void remember(const SampleShape& shape, const Plan& plan);

    /// The plan, or what was remembered of such samples where that is smaller.
    Plan within(const Plan& plan, const SampleShape& shape) const;

    bool empty() const { return caps_.empty(); }
    void clear() { caps_.clear(); }

    void save(const StateWriter& writer) const override;
    Commit prepare(const StateReader& reader) override;

private:
    struct Cap {
        SampleShape shape;
        Plan plan;
    };

    static bool covers(const SampleShape& smaller, const SampleShape& larger);

    std::vector<Cap> caps_;
};

}  // namespace microbatch
