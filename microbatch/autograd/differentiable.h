#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/custom_function.h>

#include <functional>

namespace microbatch {

/// The gradients of a node's inputs by operators, which can be differentiated again; those that autograd does not need
/// stay undefined. For the backward of a torch::autograd::Function whose own arithmetic autograd cannot see, where
/// at::GradMode::is_enabled().
///
/// `function` makes the result again, of aliases of the inputs: what one of them shares with another, and the hooks on
/// them, are the outer backward's.
torch::autograd::variable_list differentiable_gradients(
    torch::autograd::AutogradContext& context, const torch::autograd::variable_list& inputs,
    const std::function<at::Tensor(const torch::autograd::variable_list&)>& function, const at::Tensor& gradient);

}  // namespace microbatch
