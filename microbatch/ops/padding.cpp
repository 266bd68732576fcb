#include "microbatch/ops/padding.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <limits>

namespace microbatch {

namespace {

bool is_open(bool value) {
    return value;
}
bool is_shut(bool value) {
    return !value;
}
bool is_open(float value) {
    return value == 0.0F;
}
bool is_shut(float value) {
    return value <= std::numeric_limits<float>::lowest();
}

/// True if the first `open` of `count` values let through and the others do not.
template <class Value>
bool opens(const Value* row, std::int64_t stride, std::int64_t open, std::int64_t count) {
    bool right = true;
    for (std::int64_t k = 0; k < open; ++k) right &= is_open(row[k * stride]);
    for (std::int64_t k = open; k < count; ++k) right &= is_shut(row[k * stride]);
    return right;
}

/// 0 if the mask of a sample is another one.
template <class Value>
std::int64_t length_of(const Value* mask, const at::Tensor& shape, bool causal) {
    const std::int64_t tokens = shape.size(3), row = shape.stride(2), column = shape.stride(3);
    const Value* const last = mask + (tokens - 1) * row;
    std::int64_t length = 0;
    while (length < tokens && is_open(last[length * column])) ++length;
    const std::int64_t rows = row == 0 && !causal ? 1 : tokens;
    for (std::int64_t q = 0; q < rows; ++q) {
        if (!opens(mask + q * row, column, causal ? std::min(length, q + 1) : length, tokens)) return 0;
    }
    return length;
}

template <class Value>
at::Tensor lengths_of(const at::Tensor& mask, bool causal) {
    at::Tensor lengths = at::empty({mask.size(0)}, at::kLong);
    auto* const to = lengths.mutable_data_ptr<std::int64_t>();
    for (std::int64_t i = 0; i < mask.size(0); ++i) {
        to[i] = length_of(mask.const_data_ptr<Value>() + i * mask.stride(0), mask, causal);
        if (to[i] == 0) return {};
    }
    return lengths;
}

}  // namespace

at::Tensor padding_lengths(const at::Tensor& mask, bool causal) {
    if (!mask.defined() || !mask.is_cpu() || mask.layout() != at::kStrided || mask.dim() != 4 || mask.size(1) != 1 ||
        mask.size(2) != mask.size(3) || mask.numel() == 0) {
        return {};
    }
    if (mask.scalar_type() == at::kBool) return lengths_of<bool>(mask, causal);
    if (mask.scalar_type() == at::kFloat) return lengths_of<float>(mask, causal);
    return {};
}

}  // namespace microbatch
