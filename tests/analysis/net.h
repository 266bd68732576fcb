#pragma once

#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/dropout.h>
#include <torch/nn/modules/linear.h>

#include "microbatch/step/loss.h"
#include "support/models.h"
#include "support/tensors.h"

namespace microbatch::test {

inline constexpr std::int64_t samples = 5;

/// Two linear layers with tanh between them, BatchNorm after the first, dropout before each: with one dropout alone
/// the micro-batches draw one after the other just what the whole batch does.
struct Net : torch::nn::Module {
    explicit Net(bool with_norm = false, bool with_dropout = false) {
        at::manual_seed(1);
        first = register_module("first", torch::nn::Linear(3, 6));
        if (with_norm) norm = register_module("norm", torch::nn::BatchNorm1d(6));
        if (with_dropout) dropout = register_module("dropout", torch::nn::Dropout(0.5));
        last = register_module("last", torch::nn::Linear(6, 4));
    }
    at::Tensor forward(const at::Tensor& x) {
        at::Tensor y = first->forward(dropout ? dropout->forward(x) : x);
        if (norm) y = norm->forward(y);
        y = at::tanh(y);
        if (dropout) y = dropout->forward(y);
        return last->forward(y);
    }
    torch::nn::Linear first{nullptr}, last{nullptr};
    torch::nn::BatchNorm1d norm{nullptr};
    torch::nn::Dropout dropout{nullptr};
};

/// Fields: inputs, classes, and which samples count.
inline Batch some_batch(at::ScalarType type = at::kFloat) {
    at::Generator random = generator(2);
    const at::Tensor x = normal({samples, 3}, random, type);
    return {{x, test::tensor_of({0, 3, 1, 2, 0}, at::kLong), test::tensor_of({1, 0, 1, 0, 1}, type)}};
}

inline at::Tensor losses(Net& net, const Batch& batch) {
    return at::cross_entropy_loss(net.forward(batch.fields[0]), batch.fields[1], {}, at::Reduction::None);
}

inline double count(const Batch& batch) {
    return static_cast<double>(batch.size());
}

inline LossFunction summed(Net& net) {
    return [&net](const Batch& b) { return WeightedLoss{losses(net, b).sum(), count(b)}; };
}

inline LossFunction averaged(Net& net) {
    return [&net](const Batch& b) { return WeightedLoss{losses(net, b).mean(), count(b)}; };
}

}  // namespace microbatch::test
