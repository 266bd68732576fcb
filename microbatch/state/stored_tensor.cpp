#include "microbatch/state/stored_tensor.h"

#include <utility>

namespace microbatch {

StoredTensor stored(std::string name, const at::Tensor& tensor) {
    const at::Tensor detached = tensor.detach();
    return {std::move(name), detached, [detached] { return detached; }};
}

at::Tensor get_own(const StoredTensor& stored) {
    at::Tensor tensor = stored.get();
    return tensor.use_count() > 1 ? tensor.clone() : tensor;
}

std::int64_t bytes_of(const StoredTensors& tensors) {
    std::int64_t bytes = 0;
    for (const StoredTensor& tensor : tensors) bytes += static_cast<std::int64_t>(tensor.shape.nbytes());
    return bytes;
}

}  // namespace microbatch
