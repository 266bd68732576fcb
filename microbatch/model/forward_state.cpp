#include "microbatch/model/forward_state.h"

#include <ATen/core/grad_mode.h>

#include <utility>

#include "microbatch/runtime/generators.h"

namespace microbatch {
namespace {

std::vector<at::Device> devices_of(const Model& model) {
    std::vector<at::Tensor> tensors;
    for (const Parameter& parameter : model.parameters()) tensors.push_back(parameter.tensor);
    return generator_devices(tensors);
}

}  // namespace

StateDict forward_state(const Model& model) {
    const at::NoGradGuard no_grad;
    StateDict state;
    const StateWriter writer(state);
    writer.section("model").put(model.buffers());
    state.own();
    writer.put("training_flags", model.training_flags());
    save_generators(model, writer.section("rng"));
    return state;
}

void save_generators(const Model& model, const StateWriter& writer) {
    for (const at::Device& device : devices_of(model)) writer.put(device.str(), generator_state(device));
}

Commit prepare_generators(const Model& model, const StateReader& reader) {
    std::vector<std::pair<at::Device, at::Tensor>> states;
    for (const at::Device& device : devices_of(model)) {
        states.emplace_back(device, reader.tensor(device.str()).get());
        if (!is_generator_state(device, states.back().second)) {
            reader.refuse(device.str(), "it does not match this generator");
        }
    }
    if (reader.tensors().size() != states.size()) reader.refuse("", "it is for generators of other devices");
    return [states = std::move(states)] {
        for (const auto& [device, state] : states) set_generator_state(device, state);
    };
}

Commit prepare_forward_state(Model& model, const StateReader& reader) {
    Commit buffers = prepare_tensors(reader.section("model"), model.buffers(), "buffer");
    Commit generators = prepare_generators(model, reader.section("rng"));
    std::vector<std::int64_t> flags = reader.counts("training_flags");
    if (flags.size() != model.training_flags().size()) reader.refuse("training_flags", "they do not match the model");
    return [&model, buffers = std::move(buffers), generators = std::move(generators), flags = std::move(flags)] {
        model.set_training_flags(flags);
        buffers();
        generators();
    };
}

void restore_forward_state(Model& model, const StateDict& state, bool generators) {
    const StateReader reader(state);
    const StateReader saved = reader.section("model");
    NamedTensors buffers = model.buffers();
    std::erase_if(buffers, [&saved](const NamedTensor& one) { return !saved.has(one.name); });  // made since
    model.set_training_flags(reader.counts("training_flags"));
    prepare_tensors(saved, buffers, "buffer", Fit::resize)();
    if (!generators) return;
    for (const auto& [device, stored] : reader.section("rng").tensors()) {
        set_generator_state(at::Device(device), stored->get());
    }
}

}  // namespace microbatch
