#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace microbatch::test {

/// All elements of a contiguous tensor, in order.
template <class Value>
std::vector<Value> elements(const at::Tensor& tensor) {
    const auto* first = tensor.const_data_ptr<Value>();
    return {first, first + tensor.numel()};
}

}  // namespace microbatch::test
