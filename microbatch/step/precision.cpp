#include "microbatch/step/precision.h"

#include "microbatch/core/error.h"

namespace microbatch {

void FullPrecision::require(const Parameters& parameters) const {
    for (const auto& [name, tensor] : parameters) {
        if (!tensor.defined()) continue;  // refused where parameters are collected
        require_that(!tensor.is_complex(), "parameter ", name, " is complex (", tensor.scalar_type(),
                     "); only real parameters can be trained: split it into two");
        require_that(!tensor.is_floating_point() || tensor.element_size() >= 4, "parameter ", name, " is ",
                     tensor.scalar_type(),
                     ": gradient sums lose small contributions in this type; keep parameters in float32");
    }
}

}  // namespace microbatch
