#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/FunctionRef.h>

#include <initializer_list>

namespace torch::autograd {
struct Node;
}

namespace microbatch {

/// A tensor of which torch does nothing special.
bool is_plain(const at::Tensor& tensor);

/// A plain one that our own kernels take.
bool is_fp32_on_cpu(const at::Tensor& tensor);

/// Something (functorch, a TorchDispatchMode) is active that wants to see every operator.
bool operators_are_watched();

/// Somebody wants to see the gradients that reach this node of the graph.
bool has_hooks(torch::autograd::Node& node);

/// Calls add(leaf.grad) if what is made of the terms may be added there by the backward that runs now; false, and
/// nothing done, if autograd has to do it. For when that is, see InPlaceGradients.
///
/// Threads: holds the lock under which torch itself adds to this gradient.
bool sum_in_place(const at::Tensor& leaf, std::initializer_list<at::Tensor> terms,
                  c10::function_ref<void(at::Tensor& sum)> add);

}  // namespace microbatch
