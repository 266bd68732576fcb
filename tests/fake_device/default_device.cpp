#include "fake_device/default_device.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/TensorOptions.h>
#include <torch/library.h>

#include <memory>

namespace fake {
namespace {

// Not a global: who chooses may be one, made earlier.
c10::Device& chosen() {
    static c10::Device one(c10::kCPU);
    return one;
}

thread_local int on_cpu = 0;

std::optional<at::Device> device_for(std::optional<at::Device> named, std::optional<bool> pinned) {
    return named || pinned.value_or(false) || on_cpu > 0 ? named : std::optional(chosen());
}

c10::DispatchKeySet keys_of(std::optional<at::ScalarType> type, std::optional<at::Layout> layout,
                            std::optional<at::Device> where) {
    return c10::DispatchKeySet(c10::computeDispatchKey(type, layout, where));
}

at::Tensor empty(c10::SymIntArrayRef shape, std::optional<at::ScalarType> type, std::optional<at::Layout> layout,
                 std::optional<at::Device> named, std::optional<bool> pinned, std::optional<at::MemoryFormat> format) {
    const auto where = device_for(named, pinned);
    return at::_ops::empty_memory_format::redispatch(keys_of(type, layout, where), shape, type, layout, where, pinned,
                                                     format);
}

at::Tensor empty_strided(c10::SymIntArrayRef shape, c10::SymIntArrayRef strides, std::optional<at::ScalarType> type,
                         std::optional<at::Layout> layout, std::optional<at::Device> named,
                         std::optional<bool> pinned) {
    const auto where = device_for(named, pinned);
    return at::_ops::empty_strided::redispatch(keys_of(type, layout, where), shape, strides, type, layout, where,
                                               pinned);
}

}  // namespace

void make_tensors_on(c10::Device device) {
    chosen() = device;
    static const auto library = [] {
        auto made = std::make_unique<torch::Library>(torch::Library::IMPL, "aten", c10::DispatchKey::BackendSelect,
                                                     __FILE__, __LINE__);
        made->impl("empty.memory_format", TORCH_FN(fake::empty));
        made->impl("empty_strided", TORCH_FN(fake::empty_strided));
        return made;
    }();
}

MakeOnCpu::MakeOnCpu() {
    ++on_cpu;
}
MakeOnCpu::~MakeOnCpu() {
    --on_cpu;
}

}  // namespace fake
