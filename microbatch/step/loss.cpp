#include "microbatch/step/loss.h"

#include <c10/util/Exception.h>

#include <cmath>
#include <string_view>

#include "microbatch/core/batch_plan.h"
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

WeightedLoss loss_of(const LossFunction& loss, const Batch& micro) {
    try {
        return loss(micro);
    } catch (const c10::Error& error) {
        const std::string_view what = error.what_without_backtrace();
        if (what.find("Expected more than 1 value per channel") == std::string_view::npos) throw;
    }
    throw TooFewSamples(ErrorKind::usage,
                        str_cat("a micro-batch of ", micro.size(), micro.size() == 1 ? " sample" : " samples",
                                " leaves BatchNorm a single value per channel, which it cannot normalise: use a "
                                "micro-batch of at least 2, or at least 3 if the batch is odd; or use GroupNorm"));
}

}  // namespace microbatch
