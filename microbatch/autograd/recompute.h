#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>

namespace torch::nn {
class Module;
}

namespace microbatch {

/// block(x), with the same bits and the same gradients, but nothing of what the block computes is saved for backward:
/// backward runs the block once more. Without a gradient to compute it is block(x) and nothing else.
///
/// `module` is the one whose parameters and buffers the block uses. What requires grad and is used must be `x` or one
/// of its parameters. The block must not change x in place, and must draw from torch's default generators only.
///
/// Errors: backward throws ErrorKind::usage under create_graph, torch's error if x or a parameter was changed in place
///         since forward, and whatever the block throws when it runs again.
/// State:  the second run draws the random numbers of the first, under its autocast, with its training flags and with
///         the values that buffers had then; generators, flags and buffers are afterwards, also after an exception, as
///         if there had been one run. A parameter that only one block uses gets the bits of a plain backward; one that
///         several share gets its gradients added in another order.
/// Cost:   one more forward. Kept until backward: x, the generators' states (5 kB on the CPU) and the buffers that
///         forward changed. A plain backward() adds each parameter's gradient to its .grad at once; one for chosen
///         inputs, and one of parameters with hooks, holds those of the block together.
/// Source: Chen et al. 2016, arXiv:1604.06174.
at::Tensor recompute(const std::function<at::Tensor(const at::Tensor&)>& block, const at::Tensor& x,
                     const std::shared_ptr<torch::nn::Module>& module);

}  // namespace microbatch
