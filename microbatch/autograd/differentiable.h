#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/custom_function.h>

#include <functional>

namespace microbatch {

/// The gradients of a node's inputs, computed by operators that can be differentiated again; undefined where autograd
/// does not need them. For the backward of a torch::autograd::Function whose arithmetic autograd cannot see, when
/// at::GradMode::is_enabled().
///
/// `function` recomputes the result from aliases of the inputs: sharing between the inputs, and their hooks, belong to
/// the outer backward.
torch::autograd::variable_list differentiable_gradients(
    torch::autograd::AutogradContext& context, const torch::autograd::variable_list& inputs,
    const std::function<at::Tensor(const torch::autograd::variable_list&)>& function, const at::Tensor& gradient);

}  // namespace microbatch
