#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace microbatch {

/// The square of joint_norm(): fp64 without dimensions, on the device of the tensors; on the CPU if they are on several.
/// Does not wait for the device, unless there are several. Cost: as joint_norm().
at::Tensor joint_sum_of_squares(const std::vector<at::Tensor>& tensors);

/// Euclidean norm over all the tensors together, with squares summed in fp64; NaN or infinity if any element is, or if
/// the sum overflows fp64 (a norm above 1e154). 0 for no tensors. The bits do not depend on the number of threads.
/// Waits for the device once.
/// Cost: for dense float32 and float64 on the CPU, one pass at memory bandwidth and no tensor memory; for other types,
///       an fp64 copy of one tensor at a time.
double joint_norm(const std::vector<at::Tensor>& tensors);

/// The sum of squares of each tensor, in fp64, and the root of the sum of such sums, one after the other: a norm that has
/// the same bits whoever computes which tensor's. As joint_norm() otherwise.
std::vector<double> squares_of_each(const std::vector<at::Tensor>& tensors);
double norm_of_squares(const std::vector<double>& squares);

/// The factor that scales gradients of this norm to at most `limit`: min(1, limit / (norm + 1e-6)). 1 for an infinite
/// limit; otherwise NaN for a NaN norm and 0 for an infinite one: such steps must be refused before.
/// Source: Pascanu et al. 2013, arXiv:1211.5063; the 1e-6 as in torch's clip_grad_norm_.
double clip_coefficient(double norm, double limit);

}  // namespace microbatch
