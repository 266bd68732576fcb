#include "microbatch/optim/gradient_view.h"

#include <utility>

namespace microbatch {

GradientViews gradients_in(const std::vector<at::Tensor>& parameters) {
    GradientViews views;
    for (const at::Tensor& parameter : parameters) {
        if (parameter.grad().defined()) views.push_back({parameter, parameter.grad()});
    }
    return views;
}

std::vector<at::Tensor> parameters_in(std::span<const GradientView> gradients) {
    std::vector<at::Tensor> result;
    for (const GradientView& one : gradients) result.push_back(one.parameter);
    return result;
}

std::vector<at::Tensor> sums_of(std::span<const GradientView> gradients) {
    std::vector<at::Tensor> sums;
    sums.reserve(gradients.size());
    for (const GradientView& view : gradients) sums.push_back(view.sum);
    return sums;
}

ParkedGradients::ParkedGradients(std::vector<at::Tensor> parameters) : parameters_(std::move(parameters)) {
    for (const at::Tensor& parameter : parameters_) {
        gradients_.push_back(std::exchange(parameter.mutable_grad(), at::Tensor()));
        if (gradients_.back().defined()) bytes_ += static_cast<std::int64_t>(gradients_.back().nbytes());
    }
}

ParkedGradients::~ParkedGradients() {
    for (std::size_t i = 0; i < parameters_.size(); ++i) parameters_[i].mutable_grad() = gradients_[i];
}

}  // namespace microbatch
