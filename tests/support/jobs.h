#pragma once

#include <ATen/ATen.h>
#include <torch/nn/module.h>

#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "microbatch/models/gpt.h"
#include "microbatch/models/mlp.h"
#include "microbatch/models/resnet.h"
#include "microbatch/ops/cross_entropy.h"
#include "microbatch/optim/adamw.h"
#include "microbatch/optim/sgd.h"
#include "microbatch/step/accumulator.h"
#include "support/gradients.h"

namespace microbatch::test {

/// A model in training with its optimizer: everything that a step changes.
struct Job {
    std::shared_ptr<torch::nn::Module> model;
    Parameters parameters;
    LossFunction loss;
    std::function<Batch(std::int64_t)> make_batch;
    std::unique_ptr<Optimizer> optimizer;
    std::unique_ptr<Accumulator> accumulator;

    /// Parameters, buffers and the generator, copied. What the optimizer keeps shows in the steps that follow.
    Named state() const {
        Named result = values_of(parameters);
        for (const auto& buffer : model->named_buffers()) {
            result.push_back({buffer.key(), buffer.value().detach().clone()});
        }
        result.push_back({"generator", at::globalContext().defaultGenerator(at::kCPU).get_state().clone()});
        return result;
    }
};

template <class Holder>
Job make_job(Holder model, std::function<Batch(std::int64_t)> make_batch, const std::string& optimizer, Plan plan) {
    Job job;
    job.model = model.ptr();
    job.parameters = parameters_of(model);
    job.make_batch = std::move(make_batch);
    job.loss = [model](const Batch& micro) mutable -> WeightedLoss {
        return {cross_entropy_sum(model->forward(micro.fields[0]), micro.fields[1]), count_targets(micro.fields[1])};
    };
    const auto groups = split_by_decay(job.parameters, 0.1);
    if (optimizer == "sgd") {
        job.optimizer = std::make_unique<Sgd>(groups, SgdOptions{.learning_rate = 0.01, .momentum = 0.9});
    } else {
        job.optimizer = std::make_unique<AdamW>(groups);
    }
    job.accumulator =
        std::make_unique<Accumulator>(job.model, *job.optimizer, AccumulatorOptions{.plan = plan, .clip_norm = 1.0});
    return job;
}

/// With dropout the generator matters.
inline Job gpt_job(const GptConfig& config, Plan plan = {}, const std::string& optimizer = "adamw") {
    at::manual_seed(1);
    const auto batch = [config](std::int64_t samples) -> Batch {
        const auto draw = [&] { return at::randint(config.vocabulary, {samples, config.length}, at::kLong); };
        const at::Tensor tokens = draw();
        return {{tokens, draw()}};
    };
    return make_job(Gpt(config), batch, optimizer, plan);
}

/// With batch norm the buffers matter.
inline Job resnet_job(const ResNetConfig& config, Plan plan = {}, const std::string& optimizer = "adamw") {
    at::manual_seed(2);
    const auto batch = [config](std::int64_t samples) -> Batch {
        const at::Tensor images = at::randn({samples, config.channels, 12, 12});
        return {{images, at::randint(config.classes, {samples}, at::kLong)}};
    };
    return make_job(ResNet(config), batch, optimizer, plan);
}

inline Job mlp_job(const MlpConfig& config, Plan plan = {}, const std::string& optimizer = "adamw") {
    at::manual_seed(3);
    const auto batch = [config](std::int64_t samples) -> Batch {
        const at::Tensor inputs = at::randn({samples, config.inputs});
        return {{inputs, at::randint(config.classes, {samples}, at::kLong)}};
    };
    return make_job(Mlp(config), batch, optimizer, plan);
}

}  // namespace microbatch::test
