#pragma once

#include <ATen/core/Tensor.h>

#include <span>
#include <vector>

namespace microbatch {

/// The gradient of a parameter, or the sum of a batch's gradients.
struct GradientView {
    at::Tensor parameter;
    at::Tensor sum;  ///< with the parameter's sizes and dtype
};

using GradientViews = std::vector<GradientView>;

/// The .grad of the parameters that have one.
GradientViews gradients_in(const std::vector<at::Tensor>& parameters);

/// Only the sums.
std::vector<at::Tensor> sums_of(std::span<const GradientView> gradients);

}  // namespace microbatch
