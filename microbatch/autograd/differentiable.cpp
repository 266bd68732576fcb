#include "microbatch/autograd/differentiable.h"

#include <torch/csrc/autograd/autograd.h>

#include <optional>

namespace microbatch {

using torch::autograd::variable_list;

variable_list differentiable_gradients(torch::autograd::AutogradContext& context, const variable_list& inputs,
                                       const std::function<at::Tensor(const variable_list&)>& function,
                                       const at::Tensor& gradient) {
    variable_list own, wanted, results(inputs.size());
    for (const at::Tensor& input : inputs) own.push_back(input.view_as(input));
    const at::Tensor out = function(own);
    for (std::size_t i = 0; i < inputs.size(); ++i) {
        if (context.needs_input_grad(i)) wanted.push_back(own[i]);
    }
    const variable_list found = torch::autograd::grad({out}, wanted, {gradient}, /*retain_graph=*/std::nullopt,
                                                      /*create_graph=*/true, /*allow_unused=*/true);
    auto next = found.begin();
    for (std::size_t i = 0; i < inputs.size(); ++i) {
        if (context.needs_input_grad(i)) results[i] = *next++;
    }
    return results;
}

}  // namespace microbatch
