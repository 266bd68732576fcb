#include "microbatch/ops/cross_entropy.h"

#include <ATen/OpMathType.h>
#include <ATen/core/Reduction.h>
#include <ATen/ops/count_nonzero.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/ne.h>
#include <ATen/ops/nll_loss.h>

#include "microbatch/core/error.h"
#include "microbatch/ops/checks.h"

namespace microbatch {

at::Tensor cross_entropy_sum(const at::Tensor& logits, const at::Tensor& targets, std::int64_t ignored) {
    require_targets(targets);
    require_rows("logits", "classes", logits, targets);
    require_that(logits.size(-1) != 0, "logits of shape ", logits.sizes(), " have no classes");
    const at::Tensor rows = logits.reshape({targets.numel(), logits.size(-1)});
    // A sum of many losses keeps only two or three digits in half precision.
    const at::Tensor log_probabilities = at::log_softmax(rows, 1, at::toOpMathType(logits.scalar_type()));
    return at::nll_loss(log_probabilities, targets.reshape({-1}), {}, at::Reduction::Sum, ignored);
}

at::Tensor count_targets(const at::Tensor& targets, std::int64_t ignored) {
    require_targets(targets);
    return targets.ne(ignored).count_nonzero();
}

}  // namespace microbatch
