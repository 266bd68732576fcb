#pragma once

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

namespace microbatch {

using torch::autograd::variable_list;

/// The result of a fused operation, and what its backward needs beside the inputs; that may be the result itself.
struct FusedResult {
    at::Tensor out;
    variable_list saved = {};
};

/// What backward of a fused operation starts from.
struct FusedBackward {
    variable_list inputs, saved;
    at::Tensor gradient;       ///< of the result
    std::vector<bool> needed;  ///< which inputs autograd wants a gradient of
};

/// One node of the graph for an operation whose arithmetic autograd does not see:
/// `Fused<Operation>::of(operation, {x, weight})`. The operation has
///
///     FusedResult forward(const variable_list& inputs) const;
///     variable_list backward(const FusedBackward& of) const;       // of the inputs; undefined where not needed
///     at::Tensor by_operators(const variable_list& inputs) const;  // the same by torch's, which autograd
///     differentiates
///
/// State: saves the inputs. Differentiable as often as by_operators() is: backward under create_graph goes through it.
template <class Operation>
class Fused : public torch::autograd::Function<Fused<Operation>> {
public:
    static at::Tensor of(const Operation& operation, const variable_list& inputs) {
        return Fused::apply(at::TensorList(inputs), operation);
    }

    static at::Tensor forward(torch::autograd::AutogradContext* context, at::TensorList inputs,
                              const Operation& operation) {
        context->set_materialize_grads(false);
        variable_list tensors = inputs.vec();
        FusedResult result = operation.forward(tensors);
        std::move(result.saved.begin(), result.saved.end(), std::back_inserter(tensors));
        context->save_for_backward(std::move(tensors));
        context->saved_data["held"] = at::IValue::make_capsule(c10::make_intrusive<Held>(operation, inputs.size()));
        return result.out;
    }

    static variable_list backward(torch::autograd::AutogradContext* context, const variable_list& gradients) {
        const auto held = c10::static_intrusive_pointer_cast<Held>(context->saved_data["held"].toCapsule());
        variable_list results(held->inputs + 1);  // the operation itself has no gradient
        if (!gradients[0].defined()) return results;
        const variable_list tensors = context->get_saved_variables();
        const auto saved = tensors.begin() + static_cast<std::ptrdiff_t>(held->inputs);
        FusedBackward of{{tensors.begin(), saved}, {saved, tensors.end()}, gradients[0], {}};
        for (std::size_t i = 0; i < held->inputs; ++i) of.needed.push_back(context->needs_input_grad(i));
        variable_list found =
            at::GradMode::is_enabled() ? differentiable(held->operation, of) : held->operation.backward(of);
        std::move(found.begin(), found.end(), results.begin());
        return results;
    }

private:
    struct Held : torch::CustomClassHolder {
        Held(const Operation& which, std::size_t count) : operation(which), inputs(count) {}

        Operation operation;
        std::size_t inputs;
    };

    // Of aliases: sharing between the inputs, and their hooks, belong to the outer backward.
    static variable_list differentiable(const Operation& operation, const FusedBackward& of) {
        variable_list own, wanted, results(of.inputs.size());
        for (const at::Tensor& input : of.inputs) own.push_back(input.view_as(input));
        const at::Tensor out = operation.by_operators(own);
        for (std::size_t i = 0; i < own.size(); ++i) {
            if (of.needed[i]) wanted.push_back(own[i]);
        }
        const variable_list found =
            torch::autograd::grad({out}, wanted, {of.gradient}, /*retain_graph=*/std::nullopt, /*create_graph=*/true,
                                  /*allow_unused=*/true);
        auto next = found.begin();
        for (std::size_t i = 0; i < own.size(); ++i) {
            if (of.needed[i]) results[i] = *next++;
        }
        return results;
    }
};

}  // namespace microbatch
