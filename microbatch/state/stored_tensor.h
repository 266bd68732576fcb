#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace microbatch {

/// A tensor that can be had: now, from memory, or only when it is asked for, from a file.
struct StoredTensor {
    std::string name;
    at::Tensor shape;                 ///< its sizes, strides and dtype; its numbers need not be there
    std::function<at::Tensor()> get;  ///< the tensor itself; it is not to be changed
};

using StoredTensors = std::vector<StoredTensor>;

/// One that is there.
StoredTensor stored(std::string name, const at::Tensor& tensor);

/// The tensor, copied only if somebody else holds it, too.
at::Tensor get_own(const StoredTensor& stored);

/// Bytes of all of them.
std::int64_t bytes_of(const StoredTensors& tensors);

}  // namespace microbatch
