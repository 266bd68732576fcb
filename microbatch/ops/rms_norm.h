#pragma once

#include <ATen/core/Tensor.h>

namespace microbatch {

/// RMS norm of the last dimension.
///
/// Formula:  y = x / sqrt(mean(x^2) + epsilon) * scale.
/// Source:   Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", arXiv:1910.07467, eq. 4; epsilon as in
///           Llama.
/// Shapes:   x [..., width], scale [width] -> as x.
/// Errors:   ErrorKind::usage if scale is not [width].
/// State:    differentiable twice. x and scale must be unchanged when backward runs.
/// Numerics: sums over a row in fp32; in fp64 for fp64. bf16 and fp16 are widened for the norm and rounded before they
///           are multiplied by scale, as transformers does. Gradients of scale are summed in fp32, 32 rows at a time.
///           NaN stays NaN.
/// Cost:     one operation in fp32 on the CPU without autocast, torch's operators one by one otherwise; saves one
///           number a row for backward.
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& scale, double epsilon = 1e-6);

/// The same by torch's operators one by one: the reference for the fused version.
at::Tensor rms_norm_by_operators(const at::Tensor& x, const at::Tensor& scale, double epsilon = 1e-6);

}  // namespace microbatch
