#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>
#include <torch/nn/module.h>

#include <cstdint>
#include <functional>

namespace microbatch::test {

inline std::int64_t count_numbers(const torch::nn::Module& model) {
    std::int64_t sum = 0;
    for (const at::Tensor& parameter : model.parameters()) sum += parameter.numel();
    return sum;
}

/// Plain descent along the gradients of the loss at least halves it.
inline void expect_learns(torch::nn::Module& model, const std::function<at::Tensor()>& loss, double rate, int steps) {
    const double before = loss().item<double>();
    for (int step = 0; step < steps; ++step) {
        model.zero_grad();
        loss().backward();
        at::NoGradGuard no_grad;
        for (at::Tensor& parameter : model.parameters()) parameter.sub_(rate * parameter.grad());
    }
    EXPECT_LT(loss().item<double>(), before / 2);
}

}  // namespace microbatch::test
