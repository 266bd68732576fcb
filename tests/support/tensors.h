#pragma once

#include <ATen/ATen.h>

#include <initializer_list>

namespace microbatch::test {

/// at::tensor() on the device of the test, where at::tensor() is the CPU's.
template <class Number>
at::Tensor tensor_of(at::ArrayRef<Number> values, at::ScalarType type) {
    const at::Device device = at::empty({0}).device();
    return at::tensor(values, at::TensorOptions().dtype(type).device(at::kCPU)).to(device);
}

template <class Number>
at::Tensor tensor_of(std::initializer_list<Number> values, at::ScalarType type) {
    return tensor_of(at::ArrayRef<Number>(values), type);
}

}  // namespace microbatch::test
