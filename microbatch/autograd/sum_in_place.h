#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/FunctionRef.h>

#include <initializer_list>

namespace torch::autograd {
struct Node;
}

namespace microbatch {

/// A plain tensor, which torch handles in no special way.
bool is_plain(const at::Tensor& tensor);

/// A plain tensor that our own kernels support.
bool is_fp32_on_cpu(const at::Tensor& tensor);

/// True if something is active that must see every operator (functorch, a TorchDispatchMode).
bool operators_are_watched();

/// True if a hook observes the gradients that reach this node of the graph.
bool has_hooks(torch::autograd::Node& node);

/// Calls add(leaf.grad) if the running backward may accumulate the result of the terms there. Returns false and does
/// nothing if autograd has to: see InPlaceGradients.
///
/// Threads: holds the lock under which torch itself adds to this gradient.
bool sum_in_place(const at::Tensor& leaf, std::initializer_list<at::Tensor> terms,
                  c10::function_ref<void(at::Tensor& sum)> add);

}  // namespace microbatch
