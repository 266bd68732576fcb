#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <functional>
#include <vector>

#include "microbatch/runtime/autocast_types.h"

namespace microbatch {

/// The thread's modes that decide how an operator runs.
class OperatorModes {
public:
    OperatorModes();  ///< those of this thread, except that nothing is recorded

    bool grad() const { return grad_; }
    bool autocasts() const;

    /// Calls the operator in these modes, with a graph only if `graph` and they allow one.
    void call(const c10::OperatorHandle& op, torch::jit::Stack& stack, bool graph) const;

private:
    c10::impl::LocalDispatchKeySet keys_;
    bool grad_;
    AutocastTypes autocast_;
};

/// The arguments of an operator, without their tensors.
class Arguments {
public:
    Arguments() = default;

    /// Takes the arguments apart: passes every tensor, in order, with whether the operator writes to it. An undefined
    /// tensor counts; a missing optional one does not.
    Arguments(const c10::OperatorHandle& op, const torch::jit::Stack& stack,
              const std::function<void(const at::Tensor&, bool written)>& each);

    /// The arguments with these tensors.
    torch::jit::Stack with(const std::vector<at::Tensor>& tensors) const;

private:
    struct One {
        at::IValue value;  ///< without a tensor in it
        enum class Kind { plain, tensor, list, optional_list } kind = Kind::plain;
        std::vector<bool> present = {};  ///< of a list's elements
    };

    std::vector<One> all_;
};

/// The tensors among the results on the stack, in order; lists are taken apart.
std::vector<at::Tensor> result_tensors(const torch::jit::Stack& stack);

}  // namespace microbatch
