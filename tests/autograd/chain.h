#pragma once

#include <ATen/ATen.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/dropout.h>
#include <torch/nn/modules/linear.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "microbatch/autograd/recompute.h"
#include "support/gradients.h"
#include "support/one_thread.h"

namespace microbatch::test {

inline constexpr std::int64_t width = 24;

/// Linear, batch norm, dropout, linear around a shortcut, and a buffer that the result depends on and that moves.
struct Part : torch::nn::Module {
    Part()
        : up(register_module("up", torch::nn::Linear(width, 2 * width))),
          norm(register_module("norm", torch::nn::BatchNorm1d(2 * width))),
          dropout(register_module("dropout", torch::nn::Dropout(0.3))),
          down(register_module("down", torch::nn::Linear(2 * width, width))),
          scale(register_buffer("scale", at::ones({}))) {}

    at::Tensor forward(const at::Tensor& x) {
        ++runs;
        if (is_training()) scale.mul_(0.9);
        const at::Tensor y = x + down->forward(dropout->forward(norm->forward(up->forward(x)).tanh())) * scale.clone();
        if (fail) throw std::runtime_error("no luck");
        return y;
    }

    torch::nn::Linear up;
    torch::nn::BatchNorm1d norm;
    torch::nn::Dropout dropout;
    torch::nn::Linear down;
    at::Tensor scale;
    int runs = 0;
    bool fail = false;
};

struct Chain : torch::nn::Module {
    explicit Chain(int length) {
        for (int i = 0; i < length; ++i) {
            parts.push_back(register_module("part" + std::to_string(i), std::make_shared<Part>()));
        }
    }
    at::Tensor forward(const at::Tensor& input) {
        at::Tensor x = input;
        for (const auto& part : parts) {
            const auto block = [part](const at::Tensor& in) { return part->forward(in); };
            x = on ? recompute(block, x, part) : block(x);
        }
        return x;
    }
    std::vector<std::shared_ptr<Part>> parts;
    bool on = false;
};

inline std::shared_ptr<Chain> make_chain(bool on, int length = 3) {
    at::manual_seed(7);
    auto chain = std::make_shared<Chain>(length);
    chain->on = on;
    return chain;
}

inline at::Tensor input(bool requires_grad = true) {
    at::manual_seed(8);
    return at::randn({6, width}).requires_grad_(requires_grad);
}

inline at::Tensor generator_state() {
    return at::globalContext().defaultGenerator(at::kCPU).get_state();
}

inline Named buffers_and_generator(const torch::nn::Module& module) {
    Named all = {{"generator", generator_state()}};
    for (const auto& b : module.named_buffers()) all.push_back({b.key(), b.value().clone()});
    return all;
}

/// All that a backward leaves behind: gradients too.
inline Named traces(const torch::nn::Module& module) {
    Named all = buffers_and_generator(module);
    for (const auto& p : module.named_parameters()) {
        all.push_back({p.key(), p.value().grad().defined() ? p.value().grad().clone() : at::empty({0})});
    }
    return all;
}

}  // namespace microbatch::test
