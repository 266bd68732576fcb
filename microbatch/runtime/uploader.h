#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <vector>

namespace microbatch {

/// Copies tensors from the host to a device while the device computes: through pinned memory, on a stream of its own, up
/// to one call ahead of the device.
///
/// State:   two pieces of memory on each side, as large as what was uploaded in one call, reused in turn; one whose
///          tensors are still held is not reused.
/// Threads: no two calls at the same time.
/// Cost:    one copy on the host and one to the device. Waits for the device only if it is two calls behind. On a device
///          without pinned memory or streams, copies that block.
class Uploader {
public:
    explicit Uploader(at::Device device);
    Uploader(Uploader&&) noexcept;
    ~Uploader();

    /// The tensors, on the device, for its current stream; those that are not on the CPU, undefined ones and sparse ones
    /// are returned as they are.
    /// Errors: c10::OutOfMemoryError; nothing is lost then.
    std::vector<at::Tensor> upload(const std::vector<at::Tensor>& tensors);

private:
    struct Streams;
    struct Slot;

    void upload_ahead(const std::vector<std::size_t>& which, std::vector<at::Tensor>& tensors);

    at::Device device_;
    std::unique_ptr<Streams> streams_;  // none: copies block
};

}  // namespace microbatch
