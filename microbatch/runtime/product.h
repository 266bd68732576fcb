#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace microbatch {

/// at::mm(x, matrix), or at::addmm(bias, x, matrix), by that of torch's two libraries for it (MKL, oneDNN) which is the
/// faster one for these shapes on this kind of processor. Same shapes and sizes: same library, always; nothing is
/// timed. No gradient.
///
/// Shapes: x [rows, inputs], matrix [inputs, outputs], bias as for at::addmm -> [rows, outputs].
/// Errors: torch's own.
/// Cost:   oneDNN needs scratch, of a size that does not grow with the rows.
at::Tensor product(const at::Tensor& x, const at::Tensor& matrix, const std::optional<at::Tensor>& bias = {});

/// Whether product() is oneDNN's for many rows and a matrix of so many numbers, on this processor.
bool prefers_onednn(std::int64_t numbers);

}  // namespace microbatch
