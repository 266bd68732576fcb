#include "microbatch/runtime/uploader.h"

#include <ATen/Context.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <array>
#include <utility>

namespace microbatch {
namespace {

constexpr std::int64_t alignment = 256;  // bytes: of every tensor in a piece of memory

std::int64_t padded_bytes(const at::Tensor& tensor) {
    return (static_cast<std::int64_t>(tensor.nbytes()) + alignment - 1) / alignment * alignment;
}

at::Tensor bytes_on(at::Device device, std::int64_t count, bool pinned) {
    return at::empty({count}, at::TensorOptions().dtype(at::kByte).device(device).pinned_memory(pinned));
}

// A tensor like `like` in these bytes. It shares the memory and nothing else: not the version, which tells autograd of
// changes, because what is written later is for other tensors.
at::Tensor part_of(const at::Tensor& bytes, std::int64_t offset, const at::Tensor& like) {
    at::Tensor part = at::empty({0}, like.options().device(bytes.device()).pinned_memory(false));
    const bool dense = like.is_non_overlapping_and_dense();
    const std::int64_t first = offset / static_cast<std::int64_t>(like.element_size());
    return dense ? part.set_(bytes.storage(), first, like.sizes(), like.strides())
                 : part.set_(bytes.storage(), first, like.sizes(), at::detail::defaultStrides(like.sizes()));
}

}  // namespace

/// Memory of both sides, and what happens to it on the device.
struct Uploader::Slot {
    explicit Slot(c10::DeviceType type) : copied(type) {}

    at::Tensor pinned, on_device;
    c10::Event copied;

    bool is_held() const { return on_device.defined() && on_device.storage().use_count() > 1; }
};

struct Uploader::Streams {
    explicit Streams(at::Device device)
        : guard(device.type()),
          copying(guard.getStreamFromGlobalPool(device)),
          slots{Slot(device.type()), Slot(device.type())},
          before_last(device.type()) {
        bytes_on(at::kCPU, 1, /*pinned=*/true);  // throws on a device without it
        before_last.record(copying);
    }

    c10::impl::VirtualGuardImpl guard;
    c10::Stream copying;
    std::array<Slot, 2> slots;
    std::size_t next = 0;
    c10::Event before_last;     // what had been queued when the last call began
    bool next_was_held = true;  // then, by tensors of the call before it
};

Uploader::Uploader(at::Device device) : device_(device) {
    if (device.is_cpu()) return;
    at::globalContext().lazyInitDevice(device.type());
    if (!device.has_index()) device_ = c10::impl::VirtualGuardImpl(device.type()).getDevice();
    try {
        streams_ = std::make_unique<Streams>(device_);
    } catch (const c10::Error&) {
        streams_.reset();  // the device has no pinned memory, no streams or no events
    }
}

Uploader::Uploader(Uploader&&) noexcept = default;
Uploader::~Uploader() = default;

std::vector<at::Tensor> Uploader::upload(const std::vector<at::Tensor>& tensors) {
    const at::NoGradGuard no_grad;
    std::vector<at::Tensor> result = tensors;
    if (device_.is_cpu()) return result;
    std::vector<std::size_t> which;
    for (std::size_t i = 0; i < result.size(); ++i) {
        const at::Tensor& one = result[i];
        if (!one.defined() || !one.is_cpu() || one.layout() != at::kStrided) continue;
        if (streams_ == nullptr) {
            result[i] = one.to(device_);
        } else {
            which.push_back(i);
        }
    }
    if (!which.empty()) upload_ahead(which, result);
    return result;
}

void Uploader::upload_ahead(const std::vector<std::size_t>& which, std::vector<at::Tensor>& tensors) {
    std::int64_t bytes = 0;
    for (const std::size_t i : which) bytes += padded_bytes(tensors[i]);
    const c10::Stream computing = streams_->guard.getStream(device_);
    // Held until known otherwise, also where the memory for this call runs out.
    const bool was_held = std::exchange(streams_->next_was_held, true);
    Slot& slot = streams_->slots[streams_->next];
    streams_->next = 1 - streams_->next;
    // What this slot held last has been copied, unless the host is two calls ahead.
    slot.copied.synchronize();
    if (!slot.pinned.defined() || slot.pinned.numel() < bytes) {
        slot.pinned = at::Tensor();
        slot.pinned = bytes_on(at::kCPU, bytes, /*pinned=*/true);
    }
    const bool is_new = !slot.on_device.defined() || slot.on_device.numel() < bytes || slot.is_held();
    if (is_new) {
        slot.on_device = at::Tensor();
        slot.on_device = bytes_on(device_, bytes, /*pinned=*/false);
    }
    std::int64_t offset = 0;
    for (const std::size_t i : which) {
        part_of(slot.pinned, offset, tensors[i]).copy_(tensors[i]);
        const at::Tensor there = part_of(slot.on_device, offset, tensors[i]);
        offset += padded_bytes(tensors[i]);
        tensors[i] = there;
    }
    // What still computes with this memory had been queued when the last call began, or else by now.
    c10::Event now(device_.type());
    now.record(computing);
    (is_new || was_held ? now : streams_->before_last).block(streams_->copying);
    streams_->next_was_held = streams_->slots[streams_->next].is_held();
    {
        const c10::StreamGuard on_copying(streams_->copying);
        slot.on_device.narrow(0, 0, bytes).copy_(slot.pinned.narrow(0, 0, bytes), /*non_blocking=*/true);
        slot.copied.record(streams_->copying);
    }
    slot.copied.block(computing);
    streams_->before_last = std::move(now);
}

}  // namespace microbatch
