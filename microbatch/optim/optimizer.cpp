#include "microbatch/optim/optimizer.h"

#include <cmath>
#include <utility>

#include "microbatch/core/error.h"

namespace microbatch {

void Optimizer::update_only(const std::vector<at::Tensor>& /*parameters*/) {
    throw Error(ErrorKind::usage, "the state of this optimizer cannot be sharded: it does not say how");
}

void Optimizer::update_all() {
    if (!is_partial()) return;
    require_that(state_of(*this).tensors().empty(),
                 "the optimizer has a part of its state, and other processes have the rest: make a new one");
    lift_restriction();
}

void Optimizer::restrict_to(const std::vector<at::Tensor>& parameters) {
    only_.emplace();
    for (const at::Tensor& parameter : parameters) only_->insert(parameter.unsafeGetTensorImpl());
}

GradientViews Optimizer::updated(std::span<const GradientView> gradients) const {
    GradientViews result;
    for (const GradientView& one : gradients) {
        if (updates(one.parameter)) result.push_back(one);
    }
    return result;
}

std::vector<ParameterGroup> split_by_decay(const Parameters& parameters, double weight_decay) {
    ParameterGroup decayed{{}, weight_decay};
    ParameterGroup kept{{}, 0.0};
    for (const Parameter& parameter : without_repeats(parameters)) {
        (parameter.tensor.dim() >= 2 ? decayed : kept).parameters.push_back(parameter);
    }
    std::vector<ParameterGroup> groups;
    if (!decayed.parameters.empty()) groups.push_back(std::move(decayed));
    if (!kept.parameters.empty()) groups.push_back(std::move(kept));
    return groups;
}

void validate_setting(const char* optimizer, const char* name, double value) {
    require_that(value >= 0.0 && std::isfinite(value), optimizer, ": ", name, " is ", value,
                 "; it must be finite and at least 0");
}

}  // namespace microbatch
