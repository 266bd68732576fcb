#include "microbatch/optim/adamw.h"

#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <cmath>
#include <tuple>

#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"
#include "microbatch/optim/one_pass.h"

namespace microbatch {

AdamW::AdamW(const std::vector<ParameterGroup>& groups, AdamWOptions options)
    : FusedOptimizer("AdamW", groups, options.learning_rate), options_(options) {
    auto in_range = [](double beta) { return beta >= 0.0 && beta < 1.0; };
    if (!in_range(options.beta1) || !in_range(options.beta2)) {
        throw Error(ErrorKind::usage, str_cat("AdamW: the betas are ", options.beta1, " and ", options.beta2,
                                              "; each must be at least 0 and below 1"));
    }
    validate_setting("AdamW", "epsilon", options.epsilon);
}

std::vector<at::Tensor> AdamW::make_state(const at::Tensor& parameter) const {
    return {at::zeros_like(parameter), at::zeros_like(parameter), at::zeros({}, parameter.options().dtype(at::kFloat))};
}

at::Tensor AdamW::make_constant(const at::Tensor& parameter, double, double) const {
    return at::ones({}, parameter.options().dtype(at::kFloat));  // the increment of the step counts
}

void AdamW::update(const Bucket& bucket, const Settings& settings) const {
    const auto& [first_moments, second_moments, steps] = std::tie(bucket.state[0], bucket.state[1], bucket.state[2]);
    for (const at::Tensor& step : steps) *step.mutable_data_ptr<float>() += 1.0F;
    AdamWUpdate how{.beta1 = options_.beta1,
                    .beta2 = options_.beta2,
                    .epsilon = options_.epsilon,
                    .kept = 1.0 - settings.learning_rate * settings.weight_decay,
                    .length = 0.0,
                    .correction = 0.0,
                    .divisor = settings.divisor};
    for_each_stretch(bucket.parameters, [&, how](std::size_t i, std::int64_t begin, std::int64_t end) {
        const double step = *steps[i].const_data_ptr<float>();
        AdamWUpdate at_step = how;
        at_step.length = settings.learning_rate / (1.0 - std::pow(options_.beta1, step));
        at_step.correction = 1.0 / std::sqrt(1.0 - std::pow(options_.beta2, step));
        update_stretch(at_step, bucket.parameters[i], bucket.gradients[i], first_moments[i], second_moments[i], begin,
                       end);
    });
}

void AdamW::update_by_torch(Bucket& bucket, const Settings& settings) const {
    const auto& [first_moments, second_moments, steps] = std::tie(bucket.state[0], bucket.state[1], bucket.state[2]);
    at::_foreach_add_(steps, bucket.constant);
    at::_fused_adamw_(bucket.parameters, bucket.gradients, first_moments, second_moments, /*max_exp_avg_sqs=*/{}, steps,
                      settings.learning_rate, options_.beta1, options_.beta2, settings.weight_decay, options_.epsilon,
                      /*amsgrad=*/false, /*maximize=*/false);
}

}  // namespace microbatch
