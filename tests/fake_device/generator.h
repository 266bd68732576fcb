#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/stack.h>

namespace fake {

const at::Generator& default_generator();
at::Generator make_generator();

/// While it lives, what the CPU's kernels draw comes from the generator among the last `arguments` of the stack, or from
/// the device's default one.
class DrawFrom {
public:
    DrawFrom(torch::jit::Stack& stack, std::size_t arguments);
    ~DrawFrom();
    DrawFrom(const DrawFrom&) = delete;
    DrawFrom& operator=(const DrawFrom&) = delete;

private:
    at::Generator generator_;
    at::Tensor cpu_state_;
};

}  // namespace fake
