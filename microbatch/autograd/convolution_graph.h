#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

namespace microbatch {

/// True for conv1d, conv2d and conv3d of samples, with numbers as padding.
bool is_plain_convolution(const c10::OperatorHandle& op, const torch::jit::Stack& arguments);

/// A tensor with the graph of such a convolution of these arguments, but without its numbers: for a backward pass whose
/// forward result is known, or not needed.
///
/// Shapes:  `sizes` is the result's.
/// Numerics: gradients have the bits of torch's own.
at::Tensor convolution_graph(const torch::jit::Stack& arguments, at::IntArrayRef sizes);

}  // namespace microbatch
