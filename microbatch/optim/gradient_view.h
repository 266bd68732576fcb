#pragma once

#include <ATen/core/Tensor.h>

#include <span>
#include <vector>

namespace microbatch {

/// The gradient of a parameter, or a batch's sum of them.
struct GradientView {
    at::Tensor parameter;
    at::Tensor sum;  ///< of the parameter's sizes and dtype
};

using GradientViews = std::vector<GradientView>;

/// What is in .grad, of the parameters that have one.
GradientViews gradients_in(const std::vector<at::Tensor>& parameters);

/// The sums alone.
std::vector<at::Tensor> sums_of(std::span<const GradientView> gradients);

}  // namespace microbatch
