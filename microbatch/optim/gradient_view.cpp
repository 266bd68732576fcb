#include "microbatch/optim/gradient_view.h"

namespace microbatch {

GradientViews gradients_in(const std::vector<at::Tensor>& parameters) {
    GradientViews views;
    for (const at::Tensor& parameter : parameters) {
        if (parameter.grad().defined()) views.push_back({parameter, parameter.grad()});
    }
    return views;
}

std::vector<at::Tensor> sums_of(std::span<const GradientView> gradients) {
    std::vector<at::Tensor> sums;
    sums.reserve(gradients.size());
    for (const GradientView& view : gradients) sums.push_back(view.sum);
    return sums;
}

}  // namespace microbatch
