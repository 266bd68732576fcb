#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <memory>

namespace microbatch {

/// While an instance lives, backward of this thread's matrix products and embeddings accumulates the gradient of the
/// weight directly in .grad, in one GEMM (addmm with beta = 1): it allocates nothing of the weight's size and needs no
/// second pass. It works for every model, because it overrides torch's operators aten::mm, aten::addmm and
/// aten::embedding on the CPU. GEMMs also use the faster of torch's libraries: see `gemm`.
///
/// Formula:  .grad += xᵀ g for y = x W; the same sum as autograd's, rounded in a different order.
/// Falls back to autograd, for one weight and one backward at a time, if .grad must not be touched or does not exist
/// yet: no .grad; a .grad of a different type or shape; create_graph; torch::autograd::grad, or backward for selected
/// inputs; a hook on the gradient of the weight; anomaly detection; a cast (autocast) or sliced weight; forward-mode
/// differentiation, functorch, a TorchDispatchMode, tensor subclasses; sparse or frequency-scaled embeddings; complex
/// numbers. Post-accumulation hooks are called once.
/// State:    backward may run after the scope has ended. If it throws, .grad has a part of the gradient, as in torch.
/// Threads:  a scope belongs to the thread that created it, whichever thread ends it. Threads may share weights.
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
    std::shared_ptr<std::atomic<int>> scopes_;  // the number of active scopes of the thread
};

}  // namespace microbatch
