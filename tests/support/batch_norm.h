#pragma once

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/nn/module.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/linear.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "microbatch/step/gatherer.h"
#include "support/gradients.h"
#include "support/models.h"

namespace microbatch::test {

/// A model of a few lines: adds its layers to the module, and returns its forward.
using Forward = std::function<at::Tensor(const at::Tensor&)>;
using Build = std::function<Forward(torch::nn::Module&)>;

/// Registers a layer.
template <class Holder>
Holder add(torch::nn::Module& module, const std::string& name, Holder layer) {
    module.register_module(name, layer);
    return layer;
}

struct Net {
    std::shared_ptr<torch::nn::Module> module;
    Forward forward;
};

/// The same parameters every time.
inline Net make_net(const Build& build, at::ScalarType type = at::kDouble) {
    at::manual_seed(3);
    Net net{std::make_shared<torch::nn::Module>(), {}};
    net.forward = build(*net.module);
    net.module->to(type);
    return net;
}

/// Fields: samples of this shape, and for each a number that its loss is multiplied by.
inline Batch normed_batch(std::vector<std::int64_t> shape, at::ScalarType type = at::kDouble, std::uint64_t seed = 7) {
    at::Generator random = generator(seed);
    const at::Tensor x = normal(shape, random, type);
    return {{x, normal({shape[0], 1}, random, type)}};
}

/// Neither even nor odd in the outputs: what BatchNorm has made is of no use to a sum of squares. The weight is the
/// number of samples.
inline WeightedLoss sum_of_waves(const at::Tensor& outputs, const Batch& batch) {
    return {(at::sin(outputs.flatten(1) + 0.3) * batch.fields[1]).sum(), static_cast<double>(batch.size())};
}

using OutputsLoss = std::function<WeightedLoss(const at::Tensor& outputs, const Batch& batch)>;

inline LossFunction loss_with(const Net& net, OutputsLoss loss = sum_of_waves) {
    return [net, loss = std::move(loss)](const Batch& batch) { return loss(net.forward(batch.fields[0]), batch); };
}

inline Named buffers_of(const torch::nn::Module& module) {
    Named buffers;
    for (const auto& buffer : module.named_buffers()) buffers.push_back({buffer.key(), buffer.value().clone()});
    return buffers;
}

/// What a batch leaves.
struct Left {
    Named gradients;  ///< of the mean loss
    Named buffers;
    double loss = 0.0;
    double weight = 0.0;
};

/// What plain torch leaves of the batch at once.
inline Left left_at_once(const Net& net, const Batch& batch, const LossFunction& loss) {
    const Parameters parameters = parameters_of(*net.module);
    clear_gradients(parameters);
    const WeightedLoss whole = loss(batch);
    const double weight = whole.weight.value();
    if (weight > 0.0) whole.sum.backward();
    Left left{gradients_of(parameters, weight), buffers_of(*net.module), whole.sum.item<double>() / weight, weight};
    clear_gradients(parameters);
    return left;
}

inline Left left_by(const Net& net, const Batch& batch, const Plan& plan, const LossFunction& loss) {
    Gatherer gatherer(*net.module);
    const Gathered gathered = gatherer.gather(batch, plan, loss);
    Left left{gradients_of(parameters_of(*net.module), gathered.weight), buffers_of(*net.module), gathered.loss(),
              gathered.weight};
    gatherer.clear();
    return left;
}

/// Of all gradients together.
inline double gradient_difference(const Left& found, const Left& wanted) {
    double difference = 0.0, size = 0.0;
    for (std::size_t i = 0; i < wanted.gradients.size(); ++i) {
        const at::Tensor gradient = wanted.gradients[i].tensor.to(at::kDouble);
        difference += (found.gradients[i].tensor.to(at::kDouble) - gradient).square().sum().item<double>();
        size += gradient.square().sum().item<double>();
    }
    return std::sqrt(difference / size);
}

/// The gradients agree to `bar`, as do the buffers and the loss. A gradient that is zero but for rounding, such as that of a
/// bias before a BatchNorm, is measured against all of them.
inline void expect_left(const Left& found, const Left& wanted, double bar) {
    double all = 0.0;
    for (const Parameter& one : wanted.gradients) {
        if (one.tensor.defined()) all += one.tensor.to(at::kDouble).square().sum().item<double>();
    }
    ASSERT_EQ(found.gradients.size(), wanted.gradients.size());
    for (std::size_t i = 0; i < wanted.gradients.size(); ++i) {
        const auto& [name, gradient] = wanted.gradients[i];
        const at::Tensor& other = found.gradients[i].tensor;
        ASSERT_EQ(other.defined(), gradient.defined()) << name;
        if (!gradient.defined()) continue;
        const double difference = (other.to(at::kDouble) - gradient.to(at::kDouble)).norm().item<double>();
        const double size = gradient.to(at::kDouble).norm().item<double>();
        EXPECT_LE(difference, bar * (size + 0.01 * std::sqrt(all))) << name << ", of size " << size;
    }
    for (std::size_t i = 0; i < wanted.buffers.size(); ++i) {
        const at::Tensor moved = wanted.buffers[i].tensor.to(at::kDouble);
        const double difference = (found.buffers[i].tensor.to(at::kDouble) - moved).norm().item<double>();
        EXPECT_LE(difference, bar * (1.0 + moved.norm().item<double>())) << wanted.buffers[i].name;
    }
    EXPECT_NEAR(found.loss, wanted.loss, bar * std::max(1.0, std::abs(wanted.loss)));
    EXPECT_EQ(found.weight, wanted.weight);
}

/// A gradient is a sum of some 1e3 terms through some ten layers, each with an error of 1.1e-16.
inline constexpr double exact_bar = 1e-12;

/// Exact BatchNorm leaves what plain torch leaves of the batch at once, for every cut, with and without recompute.
inline void expect_exact(const Build& build, const Batch& batch, std::vector<std::int64_t> cuts = {1, 2, 3, 7},
                         const OutputsLoss& loss = sum_of_waves) {
    const Net native = make_net(build);
    const Left wanted = left_at_once(native, batch, loss_with(native, loss));
    for (const std::int64_t micro_batch : cuts) {
        for (const bool recompute : {false, true}) {
            SCOPED_TRACE(::testing::Message() << "micro-batch " << micro_batch << ", recompute " << recompute);
            const Net net = make_net(build);
            const Plan plan{.micro_batch = micro_batch, .recompute = recompute, .batch_norm = BatchNorm::exact};
            expect_left(left_by(net, batch, plan, loss_with(net, loss)), wanted, exact_bar);
        }
    }
}

inline torch::nn::Conv1d conv1d(std::int64_t inputs, std::int64_t outputs, std::int64_t kernel = 3) {
    return torch::nn::Conv1d(torch::nn::Conv1dOptions(inputs, outputs, kernel).padding(kernel / 2));
}

inline torch::nn::Conv2d conv2d(std::int64_t inputs, std::int64_t outputs, std::int64_t kernel = 3) {
    return torch::nn::Conv2d(torch::nn::Conv2dOptions(inputs, outputs, kernel).padding(kernel / 2));
}

/// Seven samples of three channels of five.
inline Batch signals() {
    return normed_batch({7, 3, 5});
}

/// A convolution, a norm and another one, with a function before, between or after.
struct Chain {
    explicit Chain(torch::nn::Module& module)
        : first(add(module, "first", conv1d(3, 4))),
          second(add(module, "second", conv1d(4, 4))),
          third(add(module, "third", conv1d(4, 2))),
          a(add(module, "a", torch::nn::BatchNorm1d(4))),
          b(add(module, "b", torch::nn::BatchNorm1d(4))) {}

    torch::nn::Conv1d first, second, third;
    torch::nn::BatchNorm1d a, b;
};

/// A convolution, a norm and tanh.
struct ConvNorm {
    ConvNorm(torch::nn::Module& module, const std::string& name, std::int64_t inputs, std::int64_t outputs)
        : conv(add(module, name + "_conv", conv1d(inputs, outputs))),
          norm(add(module, name + "_norm", torch::nn::BatchNorm1d(outputs))) {}

    at::Tensor operator()(const at::Tensor& x) { return at::tanh(norm->forward(conv->forward(x))); }

    torch::nn::Conv1d conv;
    torch::nn::BatchNorm1d norm;
};

}  // namespace microbatch::test
