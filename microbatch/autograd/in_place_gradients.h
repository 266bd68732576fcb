#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <memory>

namespace microbatch {

/// As long as one lives, this thread's matrix products and embeddings are made so that backward adds the gradient of
/// their weight to .grad where it is, by one product (addmm with beta = 1): nothing of the weight's size is allocated,
/// and no second pass adds it. It reaches every model through torch's table of operators: aten::mm, aten::addmm and
/// aten::embedding on the CPU. Products also take the faster of torch's libraries: see `product`.
///
/// Formula:  .grad += xᵀ g for y = x W; the same sum as autograd's, rounded in another order.
/// Falls back to autograd's own way, one weight and one backward at a time, where .grad must not be touched or is not
///           there yet: no .grad; one of another type or shape; create_graph; torch::autograd::grad, or backward with
///           chosen inputs; a hook on the gradient of the weight; anomaly detection; a weight that was cast (autocast)
///           or cut; forward-mode differentiation, functorch, a TorchDispatchMode, subclasses of tensors; sparse or
///           count-scaled embeddings; complex numbers. Hooks after accumulation are called, once.
/// State:    backward may run after the scope has ended. If it throws, .grad holds a part of the gradient, as torch's
///           would.
/// Threads:  a scope is that of the thread that made it, whichever thread ends it. Threads may share weights.
class InPlaceGradients {
public:
    InPlaceGradients();
    InPlaceGradients(InPlaceGradients&&) = default;
    InPlaceGradients(const InPlaceGradients&) = delete;
    InPlaceGradients& operator=(const InPlaceGradients&) = delete;
    InPlaceGradients& operator=(InPlaceGradients&&) = delete;
    ~InPlaceGradients();

    /// Whether one lives that is of this thread, and nothing is active that it steps aside for (functorch, a
    /// TorchDispatchMode).
    static bool active();

private:
    std::shared_ptr<std::atomic<int>> scopes_;  // of the thread, how many live
};

}  // namespace microbatch
