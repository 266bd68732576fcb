#pragma once

#include "microbatch/model/parameters.h"
#include "microbatch/step/gathered.h"

namespace microbatch {

/// The dtype in which gradients are summed, and its requirements for the loss and the update.
class Precision {
public:
    virtual ~Precision() = default;

    /// Errors: ErrorKind::usage, naming the parameter, if its gradients cannot be summed this way.
    virtual void require(const Parameters& parameters) const = 0;

    /// The factor by which the loss is multiplied before backward, and by which the update divides the gradients.
    virtual double loss_scale() const { return 1.0; }

    /// True if the batch overflowed at this scale: it is then skipped, which does not count as refused, and the scale
    /// is lowered.
    virtual bool skip(const Gathered&) { return false; }
};

/// Sums in the dtype of the parameters, float32 or float64.
class FullPrecision final : public Precision {
public:
    void require(const Parameters& parameters) const override;
};

}  // namespace microbatch
