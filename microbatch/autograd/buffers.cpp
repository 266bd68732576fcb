#include "microbatch/autograd/buffers.h"

#include <ATen/core/grad_mode.h>

namespace microbatch {

void overwrite_buffer(const at::Tensor& buffer, const at::Tensor& value) {
    const at::NoGradGuard no_grad;
    // variable_data has a version counter of its own.
    buffer.variable_data().copy_(value);
}

}  // namespace microbatch
