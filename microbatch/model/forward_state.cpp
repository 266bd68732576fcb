#include "microbatch/model/forward_state.h"

#include <ATen/core/grad_mode.h>

#include <utility>

#include "microbatch/runtime/generators.h"

namespace microbatch {
namespace {

std::vector<at::Device> devices_of(const Model& model) {
    return generator_devices(tensors_of(model.parameters()));
}

// Generators of another language, apart from torch's, which are named as their devices.
constexpr const char* foreign = "foreign";

NamedTensors foreign_states(const StateReader& rng) {
    NamedTensors states;
    for (const auto& [name, stored] : rng.section(foreign).tensors()) states.push_back({name, stored->get()});
    return states;
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
    writer.section(foreign).put(model.generator_states());
}

Commit prepare_generators(Model& model, const StateReader& reader) {
    std::vector<std::pair<at::Device, at::Tensor>> states;
    for (const at::Device& device : devices_of(model)) {
        states.emplace_back(device, reader.tensor(device.str()).get());
        if (!is_generator_state(device, states.back().second)) {
            reader.refuse(device.str(), "it does not match this generator");
        }
    }
    NamedTensors others = foreign_states(reader);
    if (reader.tensors().size() != states.size() + others.size()) {
        reader.refuse("", "it is for generators of other devices");
    }
    return [&model, states = std::move(states), others = std::move(others)] {
        for (const auto& [device, state] : states) set_generator_state(device, state);
        if (!others.empty()) model.set_generator_states(others);
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
    const StateReader rng = reader.section("rng");
    for (const at::Device& device : devices_of(model)) {
        if (rng.has(device.str())) set_generator_state(device, rng.tensor(device.str()).get());
    }
    const NamedTensors others = foreign_states(rng);
    if (!others.empty()) model.set_generator_states(others);
}

}  // namespace microbatch
