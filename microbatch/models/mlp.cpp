#include "microbatch/models/mlp.h"

#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/linear.h>

#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"
#include "microbatch/models/checks.h"

namespace microbatch {

MlpImpl::MlpImpl(const MlpConfig& config) : config_(config) {
    require_size("mlp", "inputs", config.inputs);
    require_size("mlp", "layers", config.layers);
    require_size("mlp", "width", config.width);
    require_size("mlp", "classes", config.classes);
    layers_ = register_module("layers", torch::nn::Sequential());
    std::int64_t inputs = config.inputs;
    for (std::int64_t layer = 0; layer < config.layers; ++layer) {
        layers_->push_back(torch::nn::Linear(inputs, config.width));
        layers_->push_back(torch::nn::ReLU());
        inputs = config.width;
    }
    layers_->push_back(torch::nn::Linear(inputs, config.classes));
}

at::Tensor MlpImpl::forward(const at::Tensor& samples) {
    if (samples.dim() < 2 || samples.flatten(1).size(1) != config_.inputs) {
        throw Error(ErrorKind::usage,
                    str_cat("mlp: the input has shape ", samples.sizes(), ", which is not a batch of samples of ",
                            config_.inputs, " numbers each; set inputs to the size of one sample"));
    }
    return layers_->forward(samples.flatten(1));
}

}  // namespace microbatch
