#pragma once

#include "microbatch/model/parameters.h"
#include "microbatch/step/gathered.h"

namespace microbatch {

/// In which dtype gradients are summed, and what that asks of loss and update.
class Precision {
public:
    virtual ~Precision() = default;

    /// Errors: ErrorKind::usage, naming the parameter, if gradients of such parameters cannot be summed this way.
    virtual void require(const Parameters& parameters) const = 0;

    /// What the loss is multiplied by before backward, and the gradients divided by in the update.
    virtual double loss_scale() const { return 1.0; }

    /// True if the batch overflowed at this scale: it is then skipped, which is not a refusal, and the scale lowered.
    virtual bool skip(const Gathered&) { return false; }
};

/// Sums in the parameters' own dtype, float32 or float64.
class FullPrecision final : public Precision {
public:
    void require(const Parameters& parameters) const override;
};

}  // namespace microbatch
