#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "microbatch/model/parameters.h"

namespace microbatch {

/// What each micro-batch adds to the sums of gradients, measured without changing a bit of them.
///
/// Numbers: of differences of sums: relative to the sum's norm off by at most the rounding of its dtype.
/// Memory:  a copy of the gradients, from the first call to the end.
/// Cost:    three passes over the gradients a call.
/// Threads: no two calls at the same time.
class MicroBatchGradientNorms {
public:
    /// Squared Euclidean norm of what has been added to the gradients since the last call, or since there were none.
    double added(const Parameters& parameters);

    /// Goes on as if the gradients that there are had been seen by the last call.
    void begin_with(const Parameters& parameters);

private:
    std::vector<at::Tensor> before_;  // one for each parameter, as its gradient was; undefined for none
};

}  // namespace microbatch
