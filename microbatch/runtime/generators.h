#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <vector>

namespace microbatch {

/// The devices whose default generators a model with these tensors uses: the CPU, then the tensors' devices.
std::vector<at::Device> generator_devices(const std::vector<at::Tensor>& tensors);

/// Torch's default generator of the device.
at::Generator default_generator(at::Device device);

/// A copy of the state of a generator, or of torch's default one of the device (5 KB on the CPU).
at::Tensor generator_state(at::Generator generator);
at::Tensor generator_state(at::Device device);

/// Errors: torch's own if it is not a state of such a generator.
void set_generator_state(at::Generator generator, const at::Tensor& state);
void set_generator_state(at::Device device, const at::Tensor& state);

/// True if the generator accepts `state` and can be used afterwards. Does not change the generator.
bool is_generator_state(at::Device device, const at::Tensor& state);

}  // namespace microbatch
