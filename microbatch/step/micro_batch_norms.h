#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "microbatch/model/parameters.h"

namespace microbatch {

/// The norm of each micro-batch's contribution to the gradient sums, measured without changing a bit of them.
///
/// Numerics: computed from differences of sums: the error relative to the norm of the sum is at most the rounding of
///           its dtype.
/// Memory:  a copy of the gradients, from the first call to the end.
/// Cost:    three passes over the gradients per call.
/// Threads: no two calls at the same time.
class MicroBatchGradientNorms {
public:
    /// Squared Euclidean norm of what has been added to the gradients since the last call, or since they were created:
    /// fp64 without dimensions, on the device of the gradients.
    at::Tensor added(const Parameters& parameters);

    /// Continues as if the last call had seen the current gradients.
    void begin_with(const Parameters& parameters);

private:
    std::vector<at::Tensor> before_;  // the previous gradient of each parameter; undefined for none
};

}  // namespace microbatch
