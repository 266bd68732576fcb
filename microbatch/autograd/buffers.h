#pragma once

#include <ATen/core/Tensor.h>

namespace microbatch {

/// Writes the value into a buffer. A graph that saved the buffer sees no change.
void overwrite_buffer(const at::Tensor& buffer, const at::Tensor& value);

}  // namespace microbatch
