#include "microbatch/optim/sgd.h"

#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/_fused_sgd.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros_like.h>

#include "microbatch/core/error.h"
#include "microbatch/optim/one_pass.h"

namespace microbatch {

Sgd::Sgd(const std::vector<ParameterGroup>& groups, SgdOptions options)
    : FusedOptimizer("Sgd", groups, options.learning_rate), options_(options) {
    set_momentum(options.momentum);
    require_that(!options.nesterov || options.momentum > 0.0, "Sgd: Nesterov requires a momentum above 0");
}

void Sgd::set_momentum(double momentum) {
    require_that(momentum >= 0.0 && momentum < 1.0, "Sgd: momentum is ", momentum,
                 "; it must be at least 0 and below 1");
    require_that((momentum == 0.0) == (options_.momentum == 0.0), "Sgd: momentum was ", options_.momentum,
                 " and cannot become ", momentum, ": make the optimizer anew");
    options_.momentum = momentum;
}

std::vector<at::Tensor> Sgd::make_state(const at::Tensor& parameter) const {
    if (options_.momentum == 0.0) return {};
    // A zero buffer without dampening: mu 0 + g is what the kernel's own first step would store.
    return {at::zeros_like(parameter)};
}

at::Tensor Sgd::make_constant(const Bucket& bucket) const {
    return at::full({}, 1.0 - bucket.learning_rate * bucket.weight_decay,
                    bucket.parameters.front().options());  // the factor of decoupled decay
}

void Sgd::update(const Bucket& bucket) const {
    const bool decoupled = options_.decoupled_weight_decay;
    const SgdUpdate how{.learning_rate = bucket.learning_rate,
                        .momentum = options_.momentum,
                        .nesterov = options_.nesterov,
                        .kept = decoupled ? 1.0 - bucket.learning_rate * bucket.weight_decay : 1.0,
                        .decay = decoupled ? 0.0 : bucket.weight_decay,
                        .divisor = bucket.divisor};
    for_each_stretch(bucket.parameters, [&](std::size_t i, std::int64_t begin, std::int64_t end) {
        update_stretch(how, kernels().exact->sgd, kernels().exact->sgd_double, bucket.parameters[i],
                       bucket.gradients[i], bucket.state.empty() ? at::Tensor() : bucket.state[0][i], {}, begin, end);
    });
}

void Sgd::update_by_torch(Bucket& bucket) const {
    const bool decoupled = options_.decoupled_weight_decay;
    if (decoupled && bucket.weight_decay != 0.0) at::_foreach_mul_(bucket.parameters, bucket.constant);
    at::_fused_sgd_(bucket.parameters, bucket.gradients,
                    bucket.state.empty() ? std::vector<at::Tensor>{} : bucket.state[0],
                    decoupled ? 0.0 : bucket.weight_decay, options_.momentum, bucket.learning_rate,
                    /*dampening=*/0.0, options_.nesterov, /*maximize=*/false,
                    /*is_first_step=*/false);
}

}  // namespace microbatch
