#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <memory>

namespace microbatch {

/// While an instance lives, backward of this thread's matrix products and embeddings accumulates the gradient of their
/// weight directly into .grad, in one gemm (addmm with beta = 1): nothing of the weight's size is allocated, and no
/// second pass adds it. It works for every model by overriding torch's operators aten::mm, aten::addmm and
/// aten::embedding on the CPU. Products also use the faster of torch's libraries: see `gemm`.
///
/// Formula:  .grad += xᵀ g for y = x W; the same sum as autograd's, rounded in another order.
/// Falls back to autograd, for one weight and one backward at a time, where .grad must not be touched or does not exist
/// yet: no .grad; one of another type or shape; create_graph; torch::autograd::grad, or backward with
///           chosen inputs; a hook on the gradient of the weight; anomaly detection; a weight that was cast (autocast)
///           or cut; forward-mode differentiation, functorch, a TorchDispatchMode, subclasses of tensors; sparse or
///           count-scaled embeddings; complex numbers. Hooks after accumulation are called, once.
/// State:    backward may run after the scope has ended. If it throws, .grad holds a part of the gradient, as torch's
///           would.
/// Threads:  a scope belongs to the thread that created it, whichever thread ends it. Threads may share weights. The
///           first scope of a process overrides the operators: no other thread may compute meanwhile.
class InPlaceGradients {
public:
    InPlaceGradients();
    InPlaceGradients(InPlaceGradients&&) = default;
    InPlaceGradients(const InPlaceGradients&) = delete;
    InPlaceGradients& operator=(const InPlaceGradients&) = delete;
    InPlaceGradients& operator=(InPlaceGradients&&) = delete;
    ~InPlaceGradients();

    /// True if this thread has an active scope, and nothing is active that suspends it (functorch, a
    /// TorchDispatchMode).
    static bool active();

private:
    std::shared_ptr<std::atomic<int>> scopes_;  // of the thread, how many live
};

}  // namespace microbatch
