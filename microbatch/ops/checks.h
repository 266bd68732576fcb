#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string_view>

namespace microbatch {

/// Checks class indices.
/// Errors: ErrorKind::usage if the tensor is undefined or not int64.
void require_targets(const at::Tensor& targets);

/// Checks rows that belong to the targets one by one. `name` and `row` are for the message, as in "logits of shape
/// [2, 3] ...; give [..., classes]".
/// Errors: ErrorKind::usage if the rows are undefined, not floating point, or not of the targets' shape and one more.
void require_rows(std::string_view name, std::string_view row, const at::Tensor& rows, const at::Tensor& targets);

/// Checks how many tokens of each sample are no padding; `operation` is for the message. Undefined: there is no padding.
/// Errors: ErrorKind::usage if the lengths are not contiguous int64 [samples] on the CPU, each 1 to tokens.
void require_lengths(std::string_view operation, const at::Tensor& lengths, std::int64_t samples, std::int64_t tokens);

}  // namespace microbatch
