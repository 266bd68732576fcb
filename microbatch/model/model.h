#pragma once

#include <concepts>
#include <memory>
#include <utility>
#include <vector>

#include "microbatch/model/parameters.h"

namespace torch::nn {
class Module;
}

namespace microbatch {

/// The tensors and modes of a model that training uses and changes. The defaults are for bare tensors: no buffers, no
/// training mode, no activation checkpointing.
///
/// Threads: no other thread may use the model during a call.
class Model {
public:
    Model() = default;
    Model(const Model&) = delete;
    Model& operator=(const Model&) = delete;
    virtual ~Model() = default;

    /// Each tensor once, including frozen ones.
    virtual Parameters parameters() const = 0;

    /// Tensors that a forward pass may change without a gradient, such as BatchNorm's running statistics.
    virtual NamedTensors buffers() const { return {}; }

    /// The training mode of every part of the model, in a fixed order.
    virtual std::vector<std::int64_t> training_flags() const { return {}; }
    virtual void set_training_flags(const std::vector<std::int64_t>&) {}

    /// The state of other generators than torch's default ones that a forward pass may draw from, by name.
    virtual NamedTensors generator_states() const { return {}; }
    virtual void set_generator_states(const NamedTensors&) {}

    /// True if the model can recompute the activations of its blocks in backward instead of storing them.
    virtual bool offers_checkpointing() const { return false; }

    /// Turns activation checkpointing on or off for every later forward. Requires: offers_checkpointing(), or `on` is
    /// false.
    virtual void set_checkpointing(bool) {}

    /// Runs backward from these tensors with these gradients, which adds to .grad; `again` keeps the graph. A model of
    /// another language turns what its code throws on the way into a C++ exception.
    virtual void backward(const std::vector<at::Tensor>& roots, const std::vector<at::Tensor>& gradients,
                          bool again) const;

    /// Adds the gradients of a micro-batch's loss to .grad: loss.backward().
    void backward(const at::Tensor& loss) const { backward({loss}, {at::Tensor()}, /*again=*/false); }
};

/// A torch::nn::Module, borrowed: it must outlive the result. Its blocks are checkpointed if it is a Recomputable.
std::shared_ptr<Model> make_model(torch::nn::Module& module);

/// Bare tensors.
std::shared_ptr<Model> make_model(Parameters parameters);

/// A model of any kind as an argument: bare tensors, a torch::nn::Module or its holder, or your own Model.
class AnyModel {
public:
    AnyModel(const Parameters& parameters) : model_(make_model(parameters)) {}  // NOLINT: implicit by design
    AnyModel(torch::nn::Module& module) : model_(make_model(module)) {}         // NOLINT

    template <std::derived_from<Model> Own>
    AnyModel(std::shared_ptr<Own> model) : model_(std::move(model)) {}  // NOLINT

    template <class Holder>
    requires requires(const Holder& holder) { holder->named_parameters(); }
    AnyModel(const Holder& holder)
        : AnyModel(const_cast<torch::nn::Module&>(  // NOLINT
              static_cast<const torch::nn::Module&>(*holder))) {}

    const std::shared_ptr<Model>& get() const { return model_; }

private:
    std::shared_ptr<Model> model_;
};

}  // namespace microbatch
