#include "microbatch/autograd/tape_replay.h"

#include <c10/util/ScopeExit.h>

#include <algorithm>
#include <utility>

#include "microbatch/autograd/convolution_graph.h"

namespace microbatch {
namespace {

template <class Each>
void for_inputs(const TapeEntry& entry, const Each& each) {
    for (const TapeInput& input : entry.inputs) {
        if (input.value >= 0) each(input.value);
    }
    for (const auto& [before, after] : entry.rewritten) each(before);
}

const at::Tensor& constant(const TapeEntry& entry, const TapeInput& input) {
    const at::Tensor& tensor = input.constant;
    const bool unchanged =
        !tensor.defined() || tensor.is_inference() || static_cast<std::uint32_t>(tensor._version()) == input.version;
    if (!unchanged || (input.written && tensor.defined())) {
        refuse_exact(entry.name(), "uses a buffer that the forward pass changes in place");
    }
    return tensor;
}

}  // namespace

void Replay::plan(const std::vector<std::int32_t>& wanted, std::int32_t begin, std::int32_t end) {
    std::vector<bool> needed(tape_.values.size(), false);
    std::vector<bool> runs(tape_.entries.size(), false);
    uses_.assign(tape_.values.size(), 0);
    const auto need = [&](std::int32_t value) {
        needed[static_cast<std::size_t>(value)] = true;
        ++uses_[static_cast<std::size_t>(value)];
    };
    wanted_ = wanted;
    for (const std::int32_t value : wanted) need(value);
    for (std::int32_t i = end - 1; i >= begin; --i) {
        if (!is_needed(tape_.entry(i), needed)) continue;
        runs[static_cast<std::size_t>(i)] = true;
        for_inputs(tape_.entry(i), need);
    }
    for (std::int32_t i = begin; i < end; ++i) {
        if (runs[static_cast<std::size_t>(i)]) order_.push_back(i);
    }
    for (std::size_t i = 0; i < needed.size(); ++i) {
        const auto value = static_cast<std::int32_t>(i);
        if (needed[i] && !runs[static_cast<std::size_t>(tape_.value(value).made_by)]) given_.push_back(value);
    }
}

bool Replay::is_needed(const TapeEntry& entry, const std::vector<bool>& needed) const {
    const auto one = [&](std::int32_t value) {
        return value >= 0 && needed[static_cast<std::size_t>(value)] && (graph_ || !tape_.value(value).kept.defined());
    };
    return std::any_of(entry.outputs.begin(), entry.outputs.end(), one) ||
           std::any_of(entry.rewritten.begin(), entry.rewritten.end(),
                       [&](const auto& pair) { return one(pair.second); });
}

void Replay::give(std::int32_t value, at::Tensor tensor) {
    tensors_[static_cast<std::size_t>(value)] = std::move(tensor);
    borrowed_.insert(value);
}

void Replay::run() {
    for (const std::int32_t i : order_) {
        const TapeEntry& entry = tape_.entry(i);
        std::vector<at::Generator> drawn_from;
        for (const auto& [generator, state] : entry.generators) drawn_from.push_back(generator);
        const GeneratorStates now = states_of(drawn_from);
        const auto put_back = c10::make_scope_exit([&now] { establish(now); });
        establish(entry.generators);
        run(entry);
    }
}

void Replay::run(const TapeEntry& entry) {
    if (!entry.op) refuse_exact(entry.name(), "would have to run again");
    torch::jit::Stack stack = entry.arguments.with(inputs_of(entry));
    if (only_graph_needed(entry, stack)) {
        set(entry.outputs[0], convolution_graph(stack, tape_.gradient(entry.outputs[0]).sizes()));
    } else {
        entry.modes.call(*entry.op, stack, graph_);
        const std::vector<at::Tensor> results = result_tensors(stack);
        for (std::size_t i = 0; i < results.size(); ++i) {
            if (entry.outputs[i] >= 0) set(entry.outputs[i], results[i]);
        }
        for (const auto& [before, after] : entry.rewritten) set(after, (*this)[before]);
    }
    for_inputs(entry, [&](std::int32_t value) { release(value); });
}

std::vector<at::Tensor> Replay::inputs_of(const TapeEntry& entry) {
    std::vector<at::Tensor> tensors;
    for (const TapeInput& input : entry.inputs) {
        tensors.push_back(input.value >= 0 ? to_use(entry, input) : constant(entry, input));
    }
    if (entry.is_barrier && barrier_input_.defined()) tensors[0] = barrier_input_;
    return tensors;
}

// A tensor that the operator changes must belong to this replay alone, and share its memory with the same others.
at::Tensor Replay::to_use(const TapeEntry& entry, const TapeInput& input) {
    const at::Tensor& tensor = (*this)[input.value];
    if (!input.written) return tensor;
    const auto is_fixed = [this](std::int32_t value) {
        return borrowed_.contains(value) || std::find(wanted_.begin(), wanted_.end(), value) != wanted_.end();
    };
    const bool fixed = is_fixed(input.value);
    const bool shared = std::any_of(entry.rewritten.begin(), entry.rewritten.end(),
                                    [&](const auto& pair) { return fixed || is_fixed(pair.first); });
    if (shared) refuse_exact(entry.name(), "changes a view in place");
    return fixed ? tensor.clone() : tensor;
}

// The last convolution before a barrier: its result is known, or no longer needed.
bool Replay::only_graph_needed(const TapeEntry& entry, const torch::jit::Stack& arguments) const {
    if (!graph_ || !is_plain_convolution(*entry.op, arguments)) return false;
    if (!entry.modes.grad() || entry.modes.autocasts()) return false;
    const std::int32_t result = entry.outputs[0];
    return uses_[static_cast<std::size_t>(result)] == 1 && tape_.gradient(result).defined();
}

void Replay::set(std::int32_t value, const at::Tensor& tensor) {
    if (uses_[static_cast<std::size_t>(value)] > 0) tensors_[static_cast<std::size_t>(value)] = tensor;
}

void Replay::release(std::int32_t value) {
    if (--uses_[static_cast<std::size_t>(value)] == 0) tensors_[static_cast<std::size_t>(value)] = at::Tensor();
}

std::vector<at::Tensor> values_again(TapeState& tape, const std::vector<std::int32_t>& wanted) {
    std::vector<std::int32_t> missing;
    for (const std::int32_t value : wanted) {
        if (!tape.value(value).kept.defined()) missing.push_back(value);
    }
    Replay replay(tape, /*graph=*/false);
    if (!missing.empty()) {
        replay.plan(missing, 0, static_cast<std::int32_t>(tape.entries.size()));
        for (const std::int32_t value : replay.given()) replay.give(value, tape.value(value).kept);
        replay.run();
    }
    std::vector<at::Tensor> tensors;
    for (const std::int32_t value : wanted) {
        const at::Tensor& kept = tape.value(value).kept;
        tensors.push_back(kept.defined() ? kept : replay[value]);
    }
    return tensors;
}

}  // namespace microbatch
