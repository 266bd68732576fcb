#include "microbatch/runtime/generators.h"

#include <ATen/Context.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <mutex>

namespace microbatch {
namespace {

// Torch accepts a Mersenne twister whose next number lies beyond its end, and would read it. The layout is the seed in
// 8 bytes, the numbers left before the next twist in 4, 4 more, and the position of the next number in 8.
bool can_be_drawn_from(const at::Tensor& twister) {
    constexpr std::size_t words = 624;
    std::int32_t left = 0;
    std::uint64_t next = 0;
    if (!twister.is_cpu() || !twister.is_contiguous() || twister.nbytes() < 24 + words * 8) return false;
    const auto* bytes = static_cast<const char*>(twister.const_data_ptr());
    std::memcpy(&left, bytes + 8, sizeof(left));
    std::memcpy(&next, bytes + 16, sizeof(next));
    return left == 1 || (left > 1 && next <= words && static_cast<std::size_t>(left) + next <= words + 1);
}

}  // namespace

std::vector<at::Device> generator_devices(const std::vector<at::Tensor>& tensors) {
    std::vector<at::Device> devices{at::Device(at::kCPU)};
    for (const at::Tensor& tensor : tensors) {
        if (std::find(devices.begin(), devices.end(), tensor.device()) == devices.end()) {
            devices.push_back(tensor.device());
        }
    }
    return devices;
}

at::Generator default_generator(at::Device device) {
    return at::globalContext().defaultGenerator(device);
}

at::Tensor generator_state(at::Generator generator) {
    const std::lock_guard lock(generator.mutex());
    return generator.get_state();
}

at::Tensor generator_state(at::Device device) {
    return generator_state(default_generator(device));
}

void set_generator_state(at::Generator generator, const at::Tensor& state) {
    const std::lock_guard lock(generator.mutex());
    generator.set_state(state);
}

void set_generator_state(at::Device device, const at::Tensor& state) {
    set_generator_state(default_generator(device), state);
}

bool is_generator_state(at::Device device, const at::Tensor& state) {
    const at::Tensor now = generator_state(device);
    if (state.sizes() != now.sizes() || state.scalar_type() != now.scalar_type()) return false;
    if (device.is_cpu() && !can_be_drawn_from(state)) return false;
    try {
        set_generator_state(device, state);
    } catch (const c10::Error&) {
        set_generator_state(device, now);
        return false;
    }
    set_generator_state(device, now);
    return true;
}

}  // namespace microbatch
