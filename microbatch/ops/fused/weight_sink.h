#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <functional>

#include "microbatch/autograd/fused.h"

namespace microbatch {

/// Receives the factors of a weight's gradient, by the weight's position in the block's weights: the gradient is left^T
/// right, or left itself if right is undefined. They are valid during the call only.
using GradientSink = std::function<void(std::size_t weight, const at::Tensor& left, const at::Tensor& right)>;

/// A sink that accumulates the gradients in `.grad` where InPlaceGradients was active in forward and it may; otherwise it
/// puts them into results. The inputs and results are the block's input and its weights in order, and must outlive it.
///
/// inputs_first: weights of two dimensions are [inputs, outputs].
GradientSink weight_sink(const FusedBackward& of, variable_list& results, bool in_place, bool inputs_first = false);

}  // namespace microbatch
