#pragma once

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/nn/module.h>

#include <functional>
#include <optional>

#include "microbatch/autograd/in_place_gradients.h"
#include "microbatch/memory/budget_allocator.h"
#include "support/gradients.h"
#include "support/one_thread.h"

namespace microbatch::test {

using Forward = std::function<at::Tensor(const at::Tensor&)>;

/// Wide enough that nothing else of a backward pass of a few rows is as large as the weight.
inline constexpr std::int64_t side = 256;
inline constexpr std::int64_t weight_bytes = side * side * 4;

inline at::Tensor leaf(at::IntArrayRef sizes, at::ScalarType type = at::kFloat) {
    return at::randn(sizes, at::TensorOptions().dtype(type)).requires_grad_();
}

/// A weight that has been through a backward pass.
inline at::Tensor weight_with_gradient(std::int64_t rows = side, std::int64_t columns = side) {
    at::manual_seed(1);
    const at::Tensor weight = leaf({rows, columns});
    weight.mutable_grad() = at::randn({rows, columns});
    return weight;
}

/// The bytes that a call has live at most, beyond those that were live before it.
template <class Call>
std::int64_t growth(Call&& call) {
    const std::int64_t before = memory_use().live_bytes;
    reset_peak_memory();
    call();
    return memory_use().peak_bytes - before;
}

/// Runs the call in a scope if `on`.
template <class Call>
auto with_scope(bool on, Call&& call) {
    std::optional<InPlaceGradients> scope;
    if (on) scope.emplace();
    return call();
}

/// Whether the backward of y, made by `forward` in a scope, needs no memory as large as the weight. Two equal weights
/// count as one where both are of that size.
template <class ForwardOnce>
bool sums_in_place(ForwardOnce&& forward) {
    const at::Tensor y = with_scope(true, forward);
    return growth([&] { y.sum().backward(); }) < weight_bytes;
}

class InPlace : public ::testing::Test {
protected:
    static void SetUpTestSuite() { install_budget_allocator(); }
};

}  // namespace microbatch::test
