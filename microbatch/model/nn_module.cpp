#include <torch/csrc/autograd/autograd.h>
#include <torch/nn/module.h>

#include "microbatch/model/model.h"
#include "microbatch/model/recomputable.h"

namespace microbatch {
namespace {

class NnModule final : public Model {
public:
    explicit NnModule(torch::nn::Module& module)
        : module_(module), recomputable_(dynamic_cast<Recomputable*>(&module)) {}

    Parameters parameters() const override { return parameters_of(module_); }

    NamedTensors buffers() const override {
        NamedTensors buffers;
        for (const auto& buffer : module_.named_buffers()) buffers.push_back({buffer.key(), buffer.value()});
        return buffers;
    }

    std::vector<std::int64_t> training_flags() const override {
        std::vector<std::int64_t> flags;
        for (const torch::nn::Module* module : modules()) flags.push_back(module->is_training() ? 1 : 0);
        return flags;
    }

    void set_training_flags(const std::vector<std::int64_t>& flags) override {
        const auto all = modules();
        // train(bool) sets the submodules too; they come later in the list and get their own flag then.
        for (std::size_t i = 0; i < all.size() && i < flags.size(); ++i) {
            if (all[i]->is_training() != (flags[i] != 0)) all[i]->train(flags[i] != 0);
        }
    }

    bool offers_checkpointing() const override { return recomputable_ != nullptr; }

    void set_checkpointing(bool on) override {
        if (recomputable_ != nullptr) recomputable_->set_recompute(on);
    }

private:
    // Parents before children, the model itself first; it may live on the stack, where it has no shared pointer.
    std::vector<torch::nn::Module*> modules() const {
        std::vector<torch::nn::Module*> all{&module_};
        for (const auto& module : module_.modules(/*include_self=*/false)) all.push_back(module.get());
        return all;
    }

    torch::nn::Module& module_;
    Recomputable* recomputable_;
};

class BareTensors final : public Model {
public:
    explicit BareTensors(Parameters parameters) : parameters_(std::move(parameters)) {}

    Parameters parameters() const override { return parameters_; }

private:
    Parameters parameters_;
};

}  // namespace

void Model::backward(const std::vector<at::Tensor>& roots, const std::vector<at::Tensor>& gradients, bool again) const {
    if (roots.size() == 1) return roots[0].backward(gradients[0], again);
    torch::autograd::backward(roots, gradients, again);
}

std::shared_ptr<Model> make_model(torch::nn::Module& module) {
    return std::make_shared<NnModule>(module);
}

std::shared_ptr<Model> make_model(Parameters parameters) {
    return std::make_shared<BareTensors>(without_repeats(parameters));
}

}  // namespace microbatch
