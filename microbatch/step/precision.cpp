#include "microbatch/step/precision.h"

#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"

namespace microbatch {

void FullPrecision::require(const Parameters& parameters) const {
    for (const auto& [name, tensor] : parameters) {
        if (!tensor.defined()) continue;  // refused where parameters are collected
        if (tensor.is_complex()) {
            throw Error(ErrorKind::usage, str_cat("parameter ", name, " is complex (", tensor.scalar_type(),
                                                  "); only real parameters can be trained: split it into two"));
        }
        if (tensor.is_floating_point() && tensor.element_size() < 4) {
            throw Error(ErrorKind::usage, str_cat("parameter ", name, " is ", tensor.scalar_type(),
                                                  ": gradient sums lose small contributions in this type; keep "
                                                  "parameters in float32"));
        }
    }
}

}  // namespace microbatch
