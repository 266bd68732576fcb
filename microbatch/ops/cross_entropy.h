#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace microbatch {

/// The cross-entropy summed over all targets that are not `ignored`: a differentiable scalar tensor. Together with
/// `count_targets` it makes a loss of {sum, weight}. If every target is ignored it is 0 with zero gradients, not NaN.
///
/// Shapes: logits [..., classes], targets the same without the last dimension, int64.
/// Units:  nats. The type is the logits' own, float32 for float16 and bfloat16.
/// Errors: ErrorKind::usage if a tensor is undefined, the shapes do not match, the targets are not int64 or the logits
///         not floating point; on the CPU torch's c10::IndexError for a target outside [0, classes) that is not
///         `ignored`.
at::Tensor cross_entropy_sum(const at::Tensor& logits, const at::Tensor& targets, std::int64_t ignored = -100);

/// The number of targets that differ from `ignored`: the weight for `cross_entropy_sum`.
/// Shapes: int64 without dimensions, on the device of the targets.
/// Errors: ErrorKind::usage if the tensor is undefined or not int64.
at::Tensor count_targets(const at::Tensor& targets, std::int64_t ignored = -100);

}  // namespace microbatch
