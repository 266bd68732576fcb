#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>

namespace torch::nn {
class Module;
}

namespace microbatch {

/// Activation checkpointing: block(x) with the same bits and the same gradients, but nothing that the block computes is
/// saved for backward; backward runs the block again. Without gradients, it is just block(x).
///
/// `module` owns the parameters and buffers that the block uses. Every tensor that requires grad and is used must be
/// `x` or one of its parameters. The block must not change x in place, and must draw from torch's default generators
/// only.
///
/// Errors: backward throws ErrorKind::usage under create_graph, torch's error if x or a parameter was changed in place
///         since forward, and whatever the block throws when it runs again.
/// State:  the second run uses the random numbers, autocast settings, training flags and buffer values of the first.
///         Afterwards, even after an exception, generators, flags and buffers are as if there had been one run. A
///         parameter that only one block uses gets the bits of a plain backward; the gradients of one that several
///         blocks share are added in another order.
/// Cost:   one more forward. Saved until backward: x, the generators' states (5 kB on the CPU) and the buffers that
///         forward changed. A plain backward() adds each parameter's gradient to its .grad at once; backward for chosen
///         inputs, or of parameters with hooks, holds all gradients of the block at once.
/// Source: Chen et al. 2016, arXiv:1604.06174.
at::Tensor recompute(const std::function<at::Tensor(const at::Tensor&)>& block, const at::Tensor& x,
                     const std::shared_ptr<torch::nn::Module>& module);

}  // namespace microbatch
