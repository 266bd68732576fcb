#include "microbatch/model/model_state.h"

#include <ATen/Context.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/equal.h>
#include <torch/nn/module.h>

#include <algorithm>
#include <mutex>

#include "microbatch/core/error.h"

namespace microbatch {
namespace {

// Other ones may be of buffers that grow.
bool same_dtypes(const auto& live, const std::vector<at::Tensor>& given, auto&& tensor_of) {
    return std::equal(live.begin(), live.end(), given.begin(), given.end(),
                      [&](const auto& one, const at::Tensor& other) {
                          return other.defined() && tensor_of(one).scalar_type() == other.scalar_type();
                      });
}

}  // namespace

ModelState::ModelState(torch::nn::Module& model) : ModelState(&model, model.parameters()) {}

ModelState::ModelState(torch::nn::Module* model, const std::vector<at::Tensor>& parameters) {
    if (model != nullptr) {
        // Parents before children, the model itself first; it may live on the stack, where it has no shared pointer.
        flags_.push_back({model, model->is_training()});
        for (const auto& module : model->modules(/*include_self=*/false)) {
            flags_.push_back({module.get(), module->is_training()});
        }
        for (const at::Tensor& buffer : model->buffers()) buffers_.push_back({buffer, buffer.detach().clone()});
    }
    std::vector<at::Device> devices{at::Device(at::kCPU)};
    for (const at::Tensor& parameter : parameters) {
        if (std::find(devices.begin(), devices.end(), parameter.device()) == devices.end()) {
            devices.push_back(parameter.device());
        }
    }
    for (const at::Device& device : devices) {
        at::Generator generator = at::globalContext().defaultGenerator(device);
        const std::lock_guard lock(generator.mutex());
        draws_.push_back({generator, generator.get_state()});
    }
}

void ModelState::restore() {
    restore_model();
    restore_generators();
}

void ModelState::restore_generators() {
    for (Draws& draws : draws_) {
        const std::lock_guard lock(draws.generator.mutex());
        draws.generator.set_state(draws.state);
    }
}

void ModelState::restore_model() {
    at::NoGradGuard no_grad;
    // train(bool) sets the submodules too; they come later in the list and get their own flag then.
    for (const Flag& flag : flags_) {
        if (flag.module->is_training() != flag.training) flag.module->train(flag.training);
    }
    for (const Buffer& buffer : buffers_) {
        // A cache that grew in the forward pass.
        if (buffer.live.sizes() != buffer.copy.sizes()) buffer.live.resize_(buffer.copy.sizes());
        buffer.live.copy_(buffer.copy);
    }
}

HeldState ModelState::held() const {
    HeldState state;
    for (const Buffer& buffer : buffers_) state.buffers.push_back(buffer.copy);
    for (const Draws& draws : draws_) state.generators.push_back(draws.state);
    return state;
}

void ModelState::hold(const HeldState& state) {
    bool alike = same_dtypes(buffers_, state.buffers, [](const Buffer& buffer) { return buffer.copy; }) &&
                 same_dtypes(draws_, state.generators, [](const Draws& draws) { return draws.state; });
    for (std::size_t i = 0; alike && i < draws_.size(); ++i) {
        alike = draws_[i].state.sizes() == state.generators[i].sizes();
    }
    if (!alike) throw Error(ErrorKind::usage, "buffers or generators are not those of this model");
    for (std::size_t i = 0; i < buffers_.size(); ++i) buffers_[i].copy = state.buffers[i];
    for (std::size_t i = 0; i < draws_.size(); ++i) draws_[i].state = state.generators[i];
}

bool ModelState::buffers_changed() const {
    for (const Buffer& buffer : buffers_) {
        if (buffer.live.sizes() != buffer.copy.sizes() || !at::equal(buffer.live, buffer.copy)) return true;
    }
    return false;
}

}  // namespace microbatch
