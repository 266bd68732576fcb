#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/Exception.h>

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
    at::Tensor get_own() const {
        const at::NoGradGuard no_grad;
        return read_ ? read_() : shape_.clone();
    }

    /// As get_own(), in the memory of the host: pinned, if the tensor is on a device that has such memory left. There it may not have arrived before
    /// wait_for() of that device.
    at::Tensor get_own_on_host() const {
        const at::NoGradGuard no_grad;
        if (read_ || shape_.is_cpu()) return get_own();
        at::Tensor host;
        try {
            host = at::empty_like(shape_, shape_.options().device(at::kCPU).pinned_memory(true));
        } catch (const c10::Error&) {
            return shape_.cpu();  // the device has no pinned memory, or no more of it
        }
        return host.copy_(shape_, /*non_blocking=*/true);
    }

private:
    at::Tensor shape_;
    std::function<at::Tensor()> read_;  // empty: shape_ is the tensor
};

}  // namespace microbatch
