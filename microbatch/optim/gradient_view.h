#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
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

/// Only the parameters.
std::vector<at::Tensor> parameters_in(std::span<const GradientView> gradients);

/// Only the sums.
std::vector<at::Tensor> sums_of(std::span<const GradientView> gradients);

/// Moves the gradients in .grad out of the way, and restores them when it is destroyed.
class ParkedGradients {
public:
    explicit ParkedGradients(std::vector<at::Tensor> parameters);
    ParkedGradients(const ParkedGradients&) = delete;
    ParkedGradients& operator=(const ParkedGradients&) = delete;
    ~ParkedGradients();

    std::int64_t bytes() const { return bytes_; }

private:
    std::vector<at::Tensor> parameters_, gradients_;
    std::int64_t bytes_ = 0;
};

}  // namespace microbatch
