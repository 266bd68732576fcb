#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/nn/module.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/linear.h>

#include <cmath>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "microbatch/models/resnet.h"
#include "microbatch/step/gatherer.h"
#include "support/gradients.h"
#include "support/models.h"

using namespace microbatch;
using namespace microbatch::test;

namespace {

/// Images and classes.
Batch image_batch(std::int64_t samples, std::int64_t channels, std::int64_t side, at::ScalarType type) {
    at::Generator random = generator(7);
    return {{normal({samples, channels, side, side}, random, type),
             at::randint(0, 10, {samples}, random, at::TensorOptions().dtype(at::kLong))}};
}

template <class Model>
LossFunction class_loss(Model model) {
    return [model](const Batch& batch) mutable -> WeightedLoss {
        const at::Tensor scores = model->forward(batch.fields[0]);
        return {at::cross_entropy_loss(scores, batch.fields[1], {}, at::Reduction::Sum),
                static_cast<double>(batch.size())};
    };
}

NamedTensors copies(const torch::nn::Module& model) {
    NamedTensors all;
    for (const auto& buffer : model.named_buffers()) all.push_back({buffer.key(), buffer.value().clone()});
    return all;
}

void put_back(torch::nn::Module& model, const NamedTensors& buffers) {
    const at::NoGradGuard no_grad;
    auto live = model.named_buffers();
    for (const NamedTensor& buffer : buffers) live[buffer.name].copy_(buffer.tensor);
}

struct Differences {
    double gradient = 0.0;  ///< of all parameters together
    double buffers = 0.0;   ///< the largest of any buffer
    double native = 0.0;    ///< the gradient of torch's own batch at once, in the same type
};

double distance(const Named& from, const Named& to) {
    double difference = 0.0, size = 0.0;
    for (std::size_t i = 0; i < to.size(); ++i) {
        difference += (from[i].tensor.to(at::kDouble) - to[i].tensor).square().sum().item<double>();
        size += to[i].tensor.square().sum().item<double>();
    }
    return std::sqrt(difference / size);
}

/// The gradient and the buffers that an exact batch leaves, in fp64; the model is then as before.
std::pair<Named, NamedTensors> exact(torch::nn::Module& model, const LossFunction& loss, const Batch& batch,
                                     const Plan& plan) {
    const NamedTensors before = copies(model);
    Gatherer gatherer(model);
    const Gathered gathered = gatherer.gather(batch, plan, loss);
    Named gradients;
    for (const Parameter& one : parameters_of(model)) {
        gradients.push_back({one.name, one.tensor.grad().to(at::kDouble) / gathered.weight});
    }
    gatherer.clear();
    std::pair<Named, NamedTensors> found{std::move(gradients), copies(model)};
    put_back(model, before);
    return found;
}

/// Of an exact batch from the batch at once, which plain torch computes in fp64: torch's own error in fp32 is larger
/// than what is measured here.
template <class Make>
Differences differences(const Make& make, const Batch& batch, const Plan& plan, at::ScalarType type) {
    auto model = make();
    model->to(type);
    auto oracle = make();
    oracle->to(at::kDouble);
    Batch precise = batch;
    precise.fields[0] = batch.fields[0].to(at::kDouble);
    const Named whole = oracle_gradients(parameters_of(*oracle), precise, class_loss(oracle));
    const NamedTensors moved = copies(*oracle);
    Batch own = batch;
    own.fields[0] = batch.fields[0].to(type);
    const auto [gradients, buffers] = exact(*model, class_loss(model), own, plan);
    auto native = make();
    native->to(type);
    Differences result{.gradient = distance(gradients, whole),
                       .native = distance(oracle_gradients(parameters_of(*native), own, class_loss(native)), whole)};
    for (std::size_t i = 0; i < moved.size(); ++i) {
        result.buffers = std::max(result.buffers, relative_difference(buffers[i].tensor, moved[i].tensor));
    }
    return result;
}

/// torchvision's resnet18, for small images: the same blocks, in-place ReLU, projections with a norm.
struct BasicBlock : torch::nn::Module {
    BasicBlock(std::int64_t inputs, std::int64_t outputs, std::int64_t stride) {
        const auto conv = [](std::int64_t in, std::int64_t out, std::int64_t kernel, std::int64_t step) {
            return torch::nn::Conv2d(
                torch::nn::Conv2dOptions(in, out, kernel).stride(step).padding(kernel / 2).bias(false));
        };
        conv1 = register_module("conv1", conv(inputs, outputs, 3, stride));
        bn1 = register_module("bn1", torch::nn::BatchNorm2d(outputs));
        conv2 = register_module("conv2", conv(outputs, outputs, 3, 1));
        bn2 = register_module("bn2", torch::nn::BatchNorm2d(outputs));
        if (stride == 1 && inputs == outputs) return;
        downsample_conv = register_module("downsample_0", conv(inputs, outputs, 1, stride));
        downsample_norm = register_module("downsample_1", torch::nn::BatchNorm2d(outputs));
    }

    at::Tensor forward(const at::Tensor& x) {
        at::Tensor out = bn1->forward(conv1->forward(x)).relu_();
        out = bn2->forward(conv2->forward(out));
        out += downsample_conv ? downsample_norm->forward(downsample_conv->forward(x)) : x;
        return out.relu_();
    }

    torch::nn::Conv2d conv1 = nullptr, conv2 = nullptr, downsample_conv = nullptr;
    torch::nn::BatchNorm2d bn1 = nullptr, bn2 = nullptr, downsample_norm = nullptr;
};

struct ResNet18 : torch::nn::Module {
    explicit ResNet18(std::int64_t width) {
        conv1 = register_module(
            "conv1", torch::nn::Conv2d(torch::nn::Conv2dOptions(3, width, 7).stride(2).padding(3).bias(false)));
        bn1 = register_module("bn1", torch::nn::BatchNorm2d(width));
        std::int64_t inputs = width;
        for (int stage = 0; stage < 4; ++stage) {
            for (int i = 0; i < 2; ++i) {
                const std::int64_t outputs = width << stage;
                blocks.push_back(
                    register_module("layer" + std::to_string(stage + 1) + "_" + std::to_string(i),
                                    std::make_shared<BasicBlock>(inputs, outputs, stage > 0 && i == 0 ? 2 : 1)));
                inputs = outputs;
            }
        }
        fc = register_module("fc", torch::nn::Linear(inputs, 10));
    }

    at::Tensor forward(const at::Tensor& images) {
        at::Tensor x = bn1->forward(conv1->forward(images)).relu_();
        x = at::max_pool2d(x, {3, 3}, {2, 2}, {1, 1});
        for (const auto& block : blocks) x = block->forward(x);
        return fc->forward(at::adaptive_avg_pool2d(x, {1, 1}).flatten(1));
    }

    torch::nn::Conv2d conv1 = nullptr;
    torch::nn::BatchNorm2d bn1 = nullptr;
    std::vector<std::shared_ptr<BasicBlock>> blocks;
    torch::nn::Linear fc = nullptr;
};

constexpr double fp32_bar = 1e-6, fp64_bar = 1e-12;

}  // namespace

TEST(ExactBatchNorm, GivesTheGradientOfTheBatchAtOnce) {
    const auto make = [] {
        at::manual_seed(3);
        return ResNet(ResNetConfig{.width = 8, .blocks = 1});
    };
    for (const auto& [type, bar] : {std::pair{at::kDouble, fp64_bar}, {at::kFloat, fp32_bar}}) {
        for (const std::int64_t samples : {256, 250}) {
            const Batch batch = image_batch(samples, 1, 12, at::kFloat);
            for (const bool recompute : {false, true}) {
                const Plan plan{.micro_batch = 8, .recompute = recompute, .batch_norm = BatchNorm::exact};
                const auto found = differences(make, batch, plan, type);
                EXPECT_LE(found.gradient, bar) << samples << " samples, recompute " << recompute;
                EXPECT_LE(found.buffers, bar) << samples << " samples, recompute " << recompute;
            }
        }
    }
}

TEST(ExactBatchNorm, GivesTheGradientOfTheBatchAtOnceForResNet18) {
    const auto make = [] {
        at::manual_seed(3);
        return std::make_shared<ResNet18>(8);
    };
    const Batch batch = image_batch(30, 3, 33, at::kFloat);
    for (const auto& [type, bar] : {std::pair{at::kDouble, fp64_bar}, {at::kFloat, fp32_bar}}) {
        for (const bool recompute : {false, true}) {
            const Plan plan{.micro_batch = 8, .recompute = recompute, .batch_norm = BatchNorm::exact};
            const auto found = differences(make, batch, plan, type);
            // Twenty layers of rounding in fp32 are more than 1e-6 for torch, too.
            EXPECT_LE(found.gradient, std::max(bar, found.native)) << "recompute " << recompute;
            EXPECT_LE(found.buffers, bar) << "recompute " << recompute;
        }
    }
}
