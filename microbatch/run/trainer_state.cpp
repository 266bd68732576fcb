#include "microbatch/run/trainer_state.h"

#include <ATen/core/grad_mode.h>

#include <utility>

#include "microbatch/core/error.h"

namespace microbatch {
namespace {

// Of all that a step changes.
template <class State, class Call>
void for_each_list(State& state, const Call& call) {
    for (auto* list : {&state.parameters, &state.buffers, &state.optimizer, &state.generators}) call(*list);
    if (!state.open) return;
    for (auto* list : {&state.open->gradients, &state.open->buffers, &state.open->generators}) call(*list);
}

}  // namespace

OptimizerState lists_of(const std::vector<std::size_t>& counts, const StoredTensors& tensors,
                        const std::function<at::Tensor(const StoredTensor&)>& get) {
    OptimizerState lists;
    std::size_t next = 0;
    for (const std::size_t count : counts) {
        if (count > tensors.size() - next) {
            throw Error(ErrorKind::bad_data, "there are fewer optimizer tensors than it says");
        }
        lists.emplace_back();
        for (std::size_t i = 0; i < count; ++i) lists.back().push_back(get(tensors[next++]));
    }
    if (next != tensors.size()) throw Error(ErrorKind::bad_data, "there are more optimizer tensors than it says");
    return lists;
}

std::int64_t bytes_to_own(const TrainerState& state) {
    std::int64_t bytes = 0;
    for_each_list(state, [&bytes](const StoredTensors& list) { bytes += bytes_of(list); });
    return bytes;
}

void own_tensors(TrainerState& state) {
    const at::NoGradGuard no_grad;
    TrainerState owned = state;
    for_each_list(owned, [](StoredTensors& list) {
        for (StoredTensor& tensor : list) tensor = stored(tensor.name, tensor.get().clone());
    });
    state = std::move(owned);
}

void drop_open_batch(TrainerState& state) {
    if (!state.open) return;
    state.buffers = state.open->buffers;
    state.generators = state.open->generators;
    state.open.reset();
}

}  // namespace microbatch
