#include "microbatch/analysis/model_state.h"

#include <ATen/Context.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/equal.h>
#include <torch/nn/module.h>

#include <algorithm>

namespace microbatch {

ModelStateScope::ModelStateScope(torch::nn::Module& model) {
    // Parents before children, the model itself first; it may live on the stack, where it has no shared pointer.
    flags_.push_back({&model, model.is_training()});
    for (const auto& module : model.modules(/*include_self=*/false)) {
        flags_.push_back({module.get(), module->is_training()});
    }
    for (const at::Tensor& buffer : model.buffers()) buffers_.push_back({buffer, buffer.detach().clone()});
    std::vector<at::Device> devices{at::Device(at::kCPU)};
    for (const at::Tensor& parameter : model.parameters()) {
        if (std::find(devices.begin(), devices.end(), parameter.device()) == devices.end()) {
            devices.push_back(parameter.device());
        }
    }
    for (const at::Device& device : devices) {
        at::Generator generator = at::globalContext().defaultGenerator(device);
        draws_.push_back({generator, generator.get_state()});
    }
}

ModelStateScope::~ModelStateScope() {
    restore();
}

void ModelStateScope::restore() {
    restore_model();
    for (Draws& draws : draws_) draws.generator.set_state(draws.state);
}

void ModelStateScope::restore_model() {
    at::NoGradGuard no_grad;
    // train(bool) sets the submodules too; they come later in the list and get their own flag then.
    for (const Flag& flag : flags_) {
        if (flag.module->is_training() != flag.training) flag.module->train(flag.training);
    }
    for (const Buffer& buffer : buffers_) buffer.live.copy_(buffer.copy);
}

bool ModelStateScope::buffers_changed() const {
    for (const Buffer& buffer : buffers_) {
        if (!at::equal(buffer.live, buffer.copy)) return true;
    }
    return false;
}

}  // namespace microbatch
