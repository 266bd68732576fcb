#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>

namespace microbatch {

/// Checks class numbers.
/// Errors: ErrorKind::usage if the tensor is undefined or not int64.
void require_targets(const at::Tensor& targets);

/// Checks rows that go with the targets one by one: `name` and `row` are for the text, as in "logits of shape [2, 3]
/// ...; give [..., classes]".
/// Errors: ErrorKind::usage if the rows are undefined, not floating point, or not of the targets' shape and one more.
void require_rows(std::string_view name, std::string_view row, const at::Tensor& rows, const at::Tensor& targets);

}  // namespace microbatch
