#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace microbatch {

/// A tensor and its name.
struct NamedTensor {
    std::string name;
    at::Tensor tensor;
};

using NamedTensors = std::vector<NamedTensor>;

/// A tensor handle, resident or lazily loaded from a file.
///
/// Threads: const calls may overlap.
class StoredTensor {
public:
    /// Resident; shares the tensor's memory.
    explicit StoredTensor(const at::Tensor& tensor) : shape_(tensor.detach()) {}

    /// In a file. `shape` has sizes, strides and dtype, and may be on the meta device.
    StoredTensor(at::Tensor shape, std::function<at::Tensor()> read)
        : shape_(std::move(shape)), read_(std::move(read)) {}

    /// Sizes, strides and dtype, without reading the values.
    const at::Tensor& shape() const { return shape_; }

    bool is_resident() const { return !read_; }
    std::int64_t bytes() const { return static_cast<std::int64_t>(shape_.nbytes()); }

    /// The tensor itself, which must not be changed. Errors: whatever reading throws.
    at::Tensor get() const { return read_ ? read_() : shape_; }

    /// A tensor that is not shared: newly read, or a copy. Errors: as get(); c10::OutOfMemoryError.
    at::Tensor get_own() const;

private:
    at::Tensor shape_;
    std::function<at::Tensor()> read_;  // empty: shape_ is the tensor
};

}  // namespace microbatch
