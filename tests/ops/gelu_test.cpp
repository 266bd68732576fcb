#include "microbatch/ops/gelu.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

namespace microbatch {
namespace {

// Both round the same formula to fp32: 2e-6 of the exact value each, see kernels_test.cpp.
constexpr double tolerance = 4e-6;

double difference(const at::Tensor& left, const at::Tensor& right) {
    return (left - right).abs().max().item<double>();
}

TEST(Gelu, EqualsTorchsWithItsGradientInEveryLayout) {
    at::manual_seed(1);
    for (const bool turned : {false, true}) {
        at::Tensor ours = at::randn({70, 1001});  // more than one thread's share
        if (turned) ours = ours.t();
        const at::Tensor theirs = ours.detach().clone().requires_grad_();
        ours = ours.detach().requires_grad_();
        const at::Tensor y = gelu_tanh(ours), expected = at::gelu(theirs, "tanh");
        const at::Tensor gradient = at::randn_like(y);
        y.backward(gradient);
        expected.backward(gradient);
        EXPECT_LE(difference(y, expected), tolerance);
        EXPECT_LE(difference(ours.grad(), theirs.grad()), 4 * tolerance);  // gradients up to 4
    }
}

TEST(Gelu, IsDifferentiableTwice) {
    at::manual_seed(2);
    const at::Tensor ours = at::randn({50}).requires_grad_();
    const at::Tensor theirs = ours.detach().clone().requires_grad_();
    const auto second = [](const at::Tensor& x, const at::Tensor& y) {
        const auto first = torch::autograd::grad({(y * y).sum()}, {x}, {}, true, /*create_graph=*/true);
        return torch::autograd::grad({(first[0] * first[0]).sum()}, {x})[0];
    };
    EXPECT_LE(difference(second(ours, gelu_tanh(ours)), second(theirs, at::gelu(theirs, "tanh"))), 1e-4);
}

TEST(Gelu, OtherTypesAreTorchsOwnBitForBit) {
    const at::Tensor x = at::randn({40}, at::kDouble);
    EXPECT_TRUE(at::equal(gelu_tanh(x), at::gelu(x, "tanh")));
    const at::Tensor low = x.to(at::kBFloat16);
    EXPECT_TRUE(at::equal(gelu_tanh(low), at::gelu(low, "tanh")));
    EXPECT_EQ(gelu_tanh(at::empty({0, 3})).numel(), 0);
}

}  // namespace
}  // namespace microbatch
