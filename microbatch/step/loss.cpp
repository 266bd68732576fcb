#include "microbatch/step/loss.h"

#include <cmath>

#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"

namespace microbatch {

void validate(const WeightedLoss& loss) {
    if (!(loss.weight >= 0.0) || !std::isfinite(loss.weight)) {
        throw Error(ErrorKind::usage, str_cat("the loss function returned the weight ", loss.weight,
                                              "; it must be finite and at least 0 (samples or target tokens)"));
    }
    if (loss.weight == 0.0) return;
    if (!loss.sum.defined()) throw Error(ErrorKind::usage, "the loss function returned an undefined sum");
    if (loss.sum.is_complex()) {
        throw Error(ErrorKind::usage, "the loss function returned a complex sum; return a real one, such as its abs()");
    }
    if (loss.sum.numel() != 1) {
        throw Error(ErrorKind::usage, str_cat("the loss function returned a tensor of shape ", loss.sum.sizes(),
                                              "; return the sum over the micro-batch, one element"));
    }
}

}  // namespace microbatch
