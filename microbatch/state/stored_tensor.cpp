#include "microbatch/state/stored_tensor.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/clone.h>

namespace microbatch {

at::Tensor StoredTensor::get_own() const {
    const at::NoGradGuard no_grad;
    return read_ ? read_() : shape_.clone();
}

}  // namespace microbatch
