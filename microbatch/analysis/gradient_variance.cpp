#include "microbatch/analysis/gradient_variance.h"

#include <ATen/core/grad_mode.h>
#include <c10/util/ScopeExit.h>

#include <algorithm>

#include "microbatch/core/error.h"
#include "microbatch/optim/clipping.h"

namespace microbatch {
namespace {

void add_mean_gradients(const Parameters& parameters, double weight, std::vector<at::Tensor>& sums) {
    at::NoGradGuard no_grad;
    for (std::size_t i = 0; i < parameters.size(); ++i) {
        const at::Tensor& gradient = parameters[i].tensor.grad();
        if (!gradient.defined()) continue;
        const at::Tensor mean = gradient.to(at::kDouble).div_(weight);
        sums[i] = sums[i].defined() ? sums[i].add_(mean) : mean;
    }
}

}  // namespace

GradientVariance gradient_variance(const Parameters& parameters, std::int64_t batches,
                                   const std::function<Batch()>& next, const Plan& plan, const LossFunction& loss) {
    require_that(batches >= 2, "a variance needs at least 2 batches, not ", batches);
    Gatherer gatherer(parameters);
    std::vector<at::Tensor> sums(gatherer.parameters().size());
    double squares = 0.0;
    for (std::int64_t r = 0; r < batches; ++r) {
        const Gathered gathered = gatherer.gather(next(), plan, loss);
        const auto clear = c10::make_scope_exit([&gatherer] { gatherer.clear(); });
        require_that(gathered.weight != 0.0, "a batch of weight 0 has no gradient to measure");
        squares += gathered.gradient_norm * gathered.gradient_norm;
        add_mean_gradients(gatherer.parameters(), gathered.weight, sums);
    }
    std::erase_if(sums, [](const at::Tensor& sum) { return !sum.defined(); });
    const double count = static_cast<double>(batches);
    const double sum_norm = joint_norm(sums);
    return {.variance = std::max(0.0, (squares - sum_norm * sum_norm / count) / (count - 1.0)),
            .mean_squared = sum_norm * sum_norm / (count * count),
            .batches = batches};
}

}  // namespace microbatch
