#pragma once

#include <cstdint>
#include <vector>

#include "microbatch/core/batch_plan.h"
#include "microbatch/data/batch.h"
#include "microbatch/state/stateful.h"

namespace microbatch {

/// The shape of one sample, field by field, without the sample dimension.
using SampleShape = std::vector<std::vector<std::int64_t>>;

SampleShape shape_of(const Batch& batch);

/// The smaller plans that samples of some shapes needed when memory ran out.
class MicroBatchCaps final : public Stateful {
public:
    /// Limits samples of this shape and larger ones to this plan from now on. An empty shape means all.
    void remember(const SampleShape& shape, const Plan& plan);

    /// The plan, limited by what is recorded for samples of this shape.
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

/// Removes the caps from a saved run, such as one that goes on with another budget.
void forget_caps(StateDict& run);

}  // namespace microbatch
