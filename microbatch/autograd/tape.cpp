#include "microbatch/autograd/tape.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/native_batch_norm.h>
#include <ATen/ops/native_batch_norm_backward.h>

#include <algorithm>
#include <utility>

#include "microbatch/autograd/tape_replay.h"
#include "microbatch/autograd/tape_state.h"
#include "microbatch/core/error.h"
#include "microbatch/runtime/generators.h"

namespace microbatch {

GeneratorStates states_of(const std::vector<at::Generator>& generators) {
    GeneratorStates states;
    for (const at::Generator& generator : generators) states.emplace_back(generator, generator_state(generator));
    return states;
}

void establish(const GeneratorStates& states) {
    for (const auto& [generator, state] : states) set_generator_state(generator, state);
}

[[noreturn]] void refuse_exact(const std::string& name, const char* why) {
    throw Error(ErrorKind::usage, "BatchNorm cannot be exact in this model, because ", name, " ", why,
                "; choose the policy deferred");
}

void TapeState::add_gradient(std::int32_t number, const at::Tensor& more) {
    if (!more.defined()) return;
    at::Tensor& sum = gradient(number);
    sum = sum.defined() ? sum + more : more;
}

std::vector<std::int32_t> TapeState::with_gradient(std::int32_t begin, std::int32_t end) {
    std::vector<std::int32_t> found;
    for (std::int32_t i = begin; i < end; ++i) {
        const auto add = [&](std::int32_t number) {
            if (number >= 0 && gradient(number).defined()) found.push_back(number);
        };
        for (const std::int32_t number : entry(i).outputs) add(number);
        for (const auto& [before, after] : entry(i).rewritten) add(after);
    }
    return found;
}

// Operators only, from a barrier (or a function) to the next.
void TapeState::differentiate_piece(std::int32_t begin, std::int32_t end, const BackwardFunction& backward) {
    const std::vector<std::int32_t> wanted = with_gradient(begin, end);
    if (wanted.empty()) return;
    Replay replay(*this, /*graph=*/true);
    replay.plan(wanted, begin, end);
    const std::vector<at::Tensor> given = values_again(*this, replay.given());
    std::vector<std::pair<std::int32_t, at::Tensor>> leaves;
    at::Tensor barrier_input;
    for (std::size_t i = 0; i < given.size(); ++i) {
        const std::int32_t number = replay.given()[i];
        const bool requires_grad = value(number).requires_grad;
        const at::Tensor leaf = given[i].detach().requires_grad_(requires_grad);
        if (requires_grad) leaves.emplace_back(number, leaf);
        replay.give(number, leaf);
        if (!requires_grad || !entry(begin).is_barrier || entry(begin).inputs[0].value != number) continue;
        // A leaf of its own: the correction is for what comes through BatchNorm alone.
        barrier_input = given[i].detach().requires_grad_();
        replay.give_barrier_input(barrier_input);
    }
    replay.run();
    std::vector<at::Tensor> roots, root_gradients;
    for (const std::int32_t number : wanted) {
        at::Tensor arrived = std::exchange(gradient(number), at::Tensor());
        if (!replay[number].requires_grad()) continue;
        roots.push_back(replay[number]);
        root_gradients.push_back(std::move(arrived));
    }
    if (roots.empty()) return;
    backward(roots, root_gradients, /*again=*/false);
    for (const auto& [number, leaf] : leaves) add_gradient(number, leaf.grad());
    if (barrier_input.defined()) barrier_gradients[barrier_at(begin)] = barrier_input.grad();
}

std::size_t TapeState::barrier_at(std::int32_t entry) const {
    return static_cast<std::size_t>(std::ranges::lower_bound(barriers, entry) - barriers.begin());
}

void TapeState::differentiate_function(TapeEntry& function, const BackwardFunction& backward) {
    std::vector<at::Tensor> roots, root_gradients;
    for (std::size_t i = 0; i < function.outputs.size(); ++i) {
        at::Tensor arrived = std::exchange(gradient(function.outputs[i]), at::Tensor());
        if (!arrived.defined()) continue;
        roots.push_back(function.roots[i]);
        root_gradients.push_back(std::move(arrived));
    }
    if (!roots.empty()) {
        // Another function may share a part of its graph.
        backward(roots, root_gradients, /*again=*/true);
        for (std::size_t i = 0; i < function.inputs.size(); ++i) {
            add_gradient(function.inputs[i].value, function.leaves[i].grad());
            function.leaves[i].mutable_grad() = at::Tensor();
        }
    }
    function.roots.clear();
    function.leaves.clear();
}

void TapeState::compute_kept(std::int32_t segment) {
    const auto place = static_cast<std::size_t>(segment);
    if (keep->fingerprint != fingerprint) return;
    const std::vector<std::int32_t>& wanted = keep->before[place];
    const std::vector<at::Tensor> tensors = values_again(*this, wanted);
    for (std::size_t i = 0; i < wanted.size(); ++i) value(wanted[i]).kept = tensors[i];
}

// What was made from there on.
void TapeState::release(std::int32_t from, bool pinned) {
    for (TapeValue& one : values) {
        if (one.made_by >= from && (pinned || !one.pinned)) one.kept = at::Tensor();
    }
}

bool BatchNormCall::same_layer(const BatchNormCall& other) const {
    return weight.is_same(other.weight) && running_mean.is_same(other.running_mean) && epsilon == other.epsilon;
}

void BatchNormSums::add(const BatchNormSums& other) {
    if (!other.gradient.defined()) return;
    gradient = gradient.defined() ? gradient + other.gradient : other.gradient;
    product = product.defined() ? product + other.product : other.product;
}

Tape::Tape(const std::vector<at::Device>& devices) : state_(std::make_unique<TapeState>()) {
    for (const at::Device& device : devices) state_->generators.push_back(default_generator(device));
}
Tape::~Tape() = default;

Program Tape::program() const {
    Program program{.fingerprint = state_->fingerprint,
                    .operators = static_cast<std::int32_t>(state_->entries.size()),
                    .barriers = state_->barriers};
    for (const TapeValue& value : state_->values) {
        program.values.push_back({.made_by = value.made_by,
                                  .storage = value.storage,
                                  .bytes = value.bytes,
                                  .overwritten = value.overwritten});
    }
    for (std::int32_t i = 0; i < program.operators; ++i) {
        const auto use = [&](std::int32_t value) {
            auto& uses = program.values[static_cast<std::size_t>(value)].used_by;
            if (value >= 0 && (uses.empty() || uses.back() != i)) uses.push_back(i);
        };
        for (const TapeInput& input : state_->entry(i).inputs) {
            if (input.value >= 0) use(input.value);
        }
        for (const auto& [before, after] : state_->entry(i).rewritten) use(before);
    }
    return program;
}

std::uint64_t Tape::fingerprint() const {
    return state_->fingerprint;
}

std::int32_t Tape::segments() const {
    return static_cast<std::int32_t>(state_->barriers.size()) + 1;
}

void Tape::add_gradient(const at::Tensor& gradient) {
    if (state_->result.value >= 0) state_->add_gradient(state_->result.value, gradient);
}

BatchNormSums Tape::differentiate(std::int32_t segment, const BackwardFunction& backward) {
    TapeState& state = *state_;
    state.compute_kept(segment);
    std::int32_t end = state.end_of(segment);
    const std::int32_t begin = state.begin_of(segment);
    for (std::int32_t i = end - 1; i >= begin; --i) {
        if (state.entry(i).node == nullptr) continue;
        if (i + 1 < end) state.differentiate_piece(i + 1, end, backward);
        state.differentiate_function(state.entry(i), backward);
        end = i;
    }
    if (begin < end) state.differentiate_piece(begin, end, backward);
    const BatchNormSums sums = segment > 0 ? state.sums_of(static_cast<std::size_t>(segment - 1)) : BatchNormSums();
    state.release(begin, /*pinned=*/true);
    return sums;
}

BatchNormSums TapeState::sums_of(std::size_t barrier) {
    const at::Tensor& arrived = barrier_gradients[barrier];
    if (!arrived.defined()) return {};
    const at::NoGradGuard no_grad;
    const at::Tensor x = values_again(*this, {entry(barriers[barrier]).inputs[0].value})[0];
    const BatchStatistics& batch = *statistics[barrier];
    // They are the gradients that BatchNorm computes of its affine parameters.
    const auto [none, product, sum] = at::native_batch_norm_backward(
        arrived, x, {}, batch.mean, batch.variance, {}, {}, /*train=*/false, batch.epsilon, {false, true, true});
    return {sum.to(at::kDouble), product.to(at::kDouble)};
}

void Tape::finish_barrier(std::int32_t j, const BatchNormSums& whole) {
    const auto place = static_cast<std::size_t>(j - 1);
    at::Tensor gradient = std::exchange(state_->barrier_gradients[place], at::Tensor());
    const TapeInput& input = state_->entry(state_->barriers[place]).inputs[0];
    if (!whole.gradient.defined() || input.value < 0 || !state_->value(input.value).requires_grad) return;
    const at::NoGradGuard no_grad;
    const BatchStatistics& batch = *state_->statistics[place];
    const at::Tensor x = values_again(*state_, {input.value})[0];
    // - mean(g) - x̂ mean(g x̂), with x̂ the normalised input: what BatchNorm computes from these affine parameters.
    const auto type = batch.mean.scalar_type();
    at::Tensor passed_on = std::get<0>(at::native_batch_norm(x, (whole.product / -batch.count).to(type),
                                                             (whole.gradient / -batch.count).to(type), batch.mean,
                                                             batch.variance, /*training=*/false, 0.0, batch.epsilon));
    if (gradient.defined()) passed_on = passed_on.add_(gradient);
    state_->add_gradient(input.value, passed_on);
    state_->release(state_->begin_of(j - 1), /*pinned=*/false);
}

}  // namespace microbatch
