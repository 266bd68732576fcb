#include "microbatch/step/micro_batch_norms.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros_like.h>

#include "microbatch/optim/clipping.h"

namespace microbatch {

at::Tensor MicroBatchGradientNorms::added(const Parameters& parameters) {
    const at::NoGradGuard no_grad;
    before_.resize(parameters.size());
    std::vector<at::Tensor> changes;
    for (std::size_t i = 0; i < parameters.size(); ++i) {
        const at::Tensor& gradient = parameters[i].tensor.grad();
        if (!gradient.defined()) continue;
        if (!before_[i].defined()) before_[i] = at::zeros_like(gradient);
        changes.push_back(before_[i].sub_(gradient));
    }
    at::Tensor squares = joint_sum_of_squares(changes);
    for (std::size_t i = 0; i < parameters.size(); ++i) {
        if (before_[i].defined()) before_[i].copy_(parameters[i].tensor.grad());
    }
    return squares;
}

void MicroBatchGradientNorms::begin_with(const Parameters& parameters) {
    before_.assign(parameters.size(), at::Tensor());
    for (std::size_t i = 0; i < parameters.size(); ++i) {
        const at::Tensor& gradient = parameters[i].tensor.grad();
        if (gradient.defined()) before_[i] = gradient.detach().clone();
    }
}

}  // namespace microbatch
