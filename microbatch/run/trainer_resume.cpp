// What a Trainer is made of, taken apart and put together again.

#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <torch/nn/module.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <unordered_map>
#include <utility>

#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"
#include "microbatch/run/trainer.h"

namespace microbatch {
namespace {

[[noreturn]] void refuse(const auto&... what) {
    throw Error(ErrorKind::bad_data, str_cat(what...));
}

Parameters buffers_of(const Accumulator& accumulator) {
    Parameters buffers;
    if (accumulator.model() == nullptr) return buffers;
    for (const auto& buffer : accumulator.model()->named_buffers()) buffers.push_back({buffer.key(), buffer.value()});
    return buffers;
}

std::vector<at::Tensor> tensors_of(const Parameters& parameters) {
    std::vector<at::Tensor> tensors;
    for (const Parameter& parameter : parameters) tensors.push_back(parameter.tensor);
    return tensors;
}

StoredTensors stored(const Parameters& parameters) {
    StoredTensors result;
    for (const Parameter& parameter : parameters)
        result.push_back(microbatch::stored(parameter.name, parameter.tensor));
    return result;
}

StoredTensors stored(const char* prefix, const std::vector<at::Tensor>& tensors) {
    StoredTensors result;
    for (const at::Tensor& tensor : tensors) {
        result.push_back(microbatch::stored(str_cat(prefix, ".", result.size()), tensor));
    }
    return result;
}

std::vector<at::Tensor> get_all(const StoredTensors& tensors) {
    std::vector<at::Tensor> result;
    for (const StoredTensor& tensor : tensors) result.push_back(tensor.get());
    return result;
}

void write_optimizer(const Accumulator& accumulator, TrainerState& state) {
    std::unordered_map<const void*, std::string> names;
    for (const Parameter& one : accumulator.parameters()) names.emplace(one.tensor.unsafeGetTensorImpl(), one.name);
    const std::vector<at::Tensor> parameters = accumulator.optimizer().parameters();
    const OptimizerState tensors = accumulator.optimizer().state();
    for (std::size_t i = 0; i < tensors.size(); ++i) {
        // An optimizer may keep its state in another way than a list for each of its parameters.
        const bool known = tensors.size() == parameters.size();
        const std::string name = known ? names[parameters[i].unsafeGetTensorImpl()] : str_cat("state.", i);
        state.optimizer_counts.push_back(tensors[i].size());
        for (StoredTensor& tensor : stored(name.c_str(), tensors[i])) state.optimizer.push_back(std::move(tensor));
    }
}

std::vector<std::string> snapshot_names(const TrainerState& state) {
    std::vector<std::string> names;
    for (const StoredTensors* list : {&state.parameters, &state.buffers}) {
        for (const StoredTensor& tensor : *list) names.push_back(tensor.name);
    }
    for (const StoredTensor& tensor : state.optimizer) names.push_back("optimizer." + tensor.name);
    return names;
}

OpenBatchState write_open_batch(const OpenBatch& open, const Accumulator& accumulator, double seconds) {
    const Parameters& parameters = accumulator.parameters();
    OpenBatchState state{.samples = open.gathered.samples,
                         .so_far = open.gathered.so_far,
                         .measure_parts = open.gathered.measure_parts,
                         .plan = open.plan,
                         .out_of_memory = open.out_of_memory,
                         .seconds = seconds,
                         .generators = stored("generator", open.before.generators)};
    const Parameters buffers = buffers_of(accumulator);
    for (std::size_t i = 0; i < buffers.size(); ++i) {
        state.buffers.push_back(microbatch::stored(buffers[i].name, open.before.buffers[i]));
    }
    for (std::size_t i = 0; i < parameters.size(); ++i) {
        const at::Tensor& gradient = open.gathered.gradients[i];
        if (gradient.defined()) state.gradients.push_back(microbatch::stored(parameters[i].name, gradient));
    }
    return state;
}

// Throws unless `given` are tensors for `live`, by name; `complete` if none may be missing.
void require_same(const StoredTensors& given, const Parameters& live, const char* what, bool complete = true) {
    std::unordered_map<std::string, at::Tensor> known;
    for (const Parameter& one : live) known.emplace(one.name, one.tensor);
    for (const StoredTensor& one : given) {
        const auto found = known.find(one.name);
        if (found == known.end()) refuse("there is no ", what, " ", one.name, " in this model");
        const at::Tensor& tensor = found->second;
        if (tensor.sizes() != one.shape.sizes() || tensor.scalar_type() != one.shape.scalar_type()) {
            refuse(what, " ", one.name, " is ", one.shape.scalar_type(), " of shape ", one.shape.sizes(),
                   ", in this model ", tensor.scalar_type(), " of shape ", tensor.sizes());
        }
        known.erase(found);
    }
    if (complete && !known.empty()) refuse(what, " ", known.begin()->first, " is missing");
}

void copy_all(const StoredTensors& given, const Parameters& live) {
    std::unordered_map<std::string, at::Tensor> known;
    for (const Parameter& one : live) known.emplace(one.name, one.tensor);
    for (const StoredTensor& one : given) known.at(one.name).copy_(one.get());
}

// What is said of a value that cannot be, in the words of who found it.
template <class Call>
void as_bad_data(const Call& call) {
    try {
        call();
    } catch (const Error& error) {
        refuse(error.what());
    } catch (const c10::OutOfMemoryError&) {
        throw;
    } catch (const c10::Error& error) {
        refuse(error.what_without_backtrace());
    }
}

// Torch takes a Mersenne twister whose next number is beyond its end, and would read it: what it holds is the seed in 8
// bytes, how many numbers are left before it is made anew in 4, 4 more, and the position of the next in 8.
bool can_be_drawn_from(const at::Tensor& twister) {
    constexpr std::size_t words = 624;
    std::int32_t left = 0;
    std::uint64_t next = 0;
    if (!twister.is_cpu() || !twister.is_contiguous() || twister.nbytes() < 24 + words * 8) return false;
    const auto* bytes = static_cast<const char*>(twister.const_data_ptr());
    std::memcpy(&left, bytes + 8, sizeof(left));
    std::memcpy(&next, bytes + 16, sizeof(next));
    return left == 1 || (left > 1 && next <= words && static_cast<std::size_t>(left) + next <= words + 1);
}

}  // namespace

TrainerState Trainer::state() const {
    TrainerState state{.progress = progress_,
                       .sampler = sampler_.state(),
                       .dataset_size = dataset_.size(),
                       .learning_rate = accumulator_.optimizer().learning_rate(),
                       .own_rate = own_rate_,
                       .last_batch = last_batch_,
                       .shrunk_at = shrunk_at_,
                       .noise = noise_.state(),
                       .limits = accumulator_.limits()};
    if (guard_) state.guard = guard_->state();
    const Parameters& parameters = accumulator_.parameters();
    state.parameters = stored(parameters);
    state.buffers = stored(buffers_of(accumulator_));
    write_optimizer(accumulator_, state);
    state.generators = stored("generator", ModelState(nullptr, tensors_of(parameters)).held().generators);
    if (recovery_) state.recovery = recovery_->state(snapshot_names(state));
    if (const auto open = accumulator_.open_batch()) state.open = write_open_batch(*open, accumulator_, open_seconds_);
    return state;
}

void Trainer::restore(const TrainerState& state) {
    const at::NoGradGuard no_grad;
    accumulator_.require_idle();
    require_fits(state);
    Sampler sampler = sampler_;
    NoiseAverage noise = noise_;
    std::optional<SpikeGuard> guard = guard_;
    std::optional<Recovery> recovery;
    if (recovery_) recovery.emplace(*recovery_);
    ModelState generators(nullptr, tensors_of(accumulator_.parameters()));
    as_bad_data([&] {
        sampler.restore(state.sampler);
        noise.restore(state.noise);
        if (guard && state.guard) guard->restore(*state.guard);
        if (state.open) require_generators(get_all(state.open->generators));
        require_generators(get_all(state.generators));
        if (recovery && state.recovery) recovery->restore(*state.recovery);
        // From here on something is changed.
        restore_optimizer(state);
        generators.hold({.buffers = {}, .generators = get_all(state.generators)});
    });
    accumulator_.optimizer().set_learning_rate(state.learning_rate);
    copy_all(state.parameters, accumulator_.parameters());
    copy_all(state.buffers, buffers_of(accumulator_));
    accumulator_.restore_limits(state.limits);
    generators.restore_generators();
    if (state.open) restore_open_batch(*state.open);
    sampler_ = sampler;
    noise_ = noise;
    guard_ = std::move(guard);
    if (recovery) recovery_.emplace(std::move(*recovery));
    progress_ = state.progress;
    own_rate_ = state.own_rate;
    last_batch_ = state.last_batch;
    shrunk_at_ = state.shrunk_at;
    open_seconds_ = state.open ? state.open->seconds : 0.0;
    open_warning_.clear();
}

// Throws unless torch takes them; leaves the generators as they are.
void Trainer::require_generators(const std::vector<at::Tensor>& states) const {
    const std::vector<at::Tensor> parameters = tensors_of(accumulator_.parameters());
    if (!states.empty() && !can_be_drawn_from(states.front())) refuse("the generator's state is none");
    const ModelStateScope now(nullptr, parameters);
    ModelState given(nullptr, parameters);
    given.hold({.buffers = {}, .generators = states});
    given.restore_generators();
}

void Trainer::require_fits(const TrainerState& state) const {
    const Progress& progress = state.progress;
    const auto is_positive = [](double number) { return std::isfinite(number) && number >= 0.0; };
    if (progress.steps < 0 || progress.samples < 0 || progress.tokens < 0 || state.last_batch < 0 ||
        state.shrunk_at < 0 || !is_positive(state.learning_rate) || !is_positive(state.own_rate)) {
        refuse("a number of the run is none");
    }
    if (state.dataset_size != dataset_.size()) {
        refuse("it is of a run over ", state.dataset_size, " samples, the data has ", dataset_.size());
    }
    require_same(state.parameters, accumulator_.parameters(), "parameter");
    require_same(state.buffers, buffers_of(accumulator_), "buffer");
    require_optimizer(state.optimizer_counts, state.optimizer);
    if (state.recovery) {
        if (state.recovery->gone_back_at > progress.steps || state.recovery->times > progress.steps) {
            refuse("it went back at a step that is still to come");
        }
        for (const RecoveryState::Point& point : state.recovery->points) {
            if (point.steps > progress.steps) refuse("a snapshot is of a step that is still to come");
            if (point.guard.refused_in_a_row > progress.steps) refuse("more steps were refused than were made");
            require_point(point);
        }
    }
    if (state.guard && state.guard->refused_in_a_row > progress.steps) refuse("more steps were refused than were made");
    if (!state.open) return;
    const OpenBatchState& open = *state.open;
    if (open.samples < 1 || open.plan.micro_batch < 1 || open.so_far.micro_batches < 1 ||
        open.so_far.micro_batches > open.samples || open.so_far.parts.count < 0 ||
        open.so_far.parts.count > open.so_far.micro_batches || open.out_of_memory < 0 ||
        open.out_of_memory > INT32_MAX || !is_positive(open.so_far.weight) || !is_positive(open.seconds)) {
        refuse("a number of the batch that was left open is none");
    }
    require_same(open.gradients, accumulator_.parameters(), "gradient of", false);
    require_same(open.buffers, buffers_of(accumulator_), "buffer before the batch that was left open:");
}

// Throws unless they can be the optimizer's tensors, so many of each of its parameters.
void Trainer::require_optimizer(const std::vector<std::size_t>& counts, const StoredTensors& tensors) const {
    const OptimizerState shapes = lists_of(counts, tensors, [](const StoredTensor& one) { return one.shape; });
    as_bad_data([&] { accumulator_.optimizer().require_state(shapes); });
}

void Trainer::require_point(const RecoveryState::Point& point) const {
    std::vector<at::Tensor> weights = tensors_of(accumulator_.parameters());
    for (const Parameter& buffer : buffers_of(accumulator_)) weights.push_back(buffer.tensor);
    const auto is_alike = [](const at::Tensor& one, const StoredTensor& other) {
        return one.sizes() == other.shape.sizes() && one.scalar_type() == other.shape.scalar_type();
    };
    if (point.tensors.size() < weights.size() ||
        !std::equal(weights.begin(), weights.end(), point.tensors.begin(), is_alike)) {
        refuse("the snapshot of step ", point.steps, " is of another model");
    }
    const auto first = point.tensors.begin() + static_cast<std::ptrdiff_t>(weights.size());
    require_optimizer(point.state_counts, {first, point.tensors.end()});
}

void Trainer::restore_optimizer(const TrainerState& state) {
    accumulator_.optimizer().adopt(lists_of(state.optimizer_counts, state.optimizer, get_own));
}

void Trainer::restore_open_batch(const OpenBatchState& state) {
    OpenBatch open;
    open.gathered.samples = state.samples;
    open.gathered.so_far = state.so_far;
    open.gathered.measure_parts = state.measure_parts;
    open.plan = state.plan;
    open.out_of_memory = state.out_of_memory;
    // In the model's own order.
    std::unordered_map<std::string, const StoredTensor*> buffers;
    for (const StoredTensor& one : state.buffers) buffers.emplace(one.name, &one);
    for (const Parameter& one : buffers_of(accumulator_)) open.before.buffers.push_back(buffers.at(one.name)->get());
    open.before.generators = get_all(state.generators);
    std::unordered_map<std::string, const StoredTensor*> gradients;
    for (const StoredTensor& one : state.gradients) gradients.emplace(one.name, &one);
    for (const Parameter& parameter : accumulator_.parameters()) {
        const auto found = gradients.find(parameter.name);
        open.gathered.gradients.push_back(
            found == gradients.end() ? at::Tensor() : get_own(*found->second).to(parameter.tensor.device()));
    }
    accumulator_.go_on(open);
}

}  // namespace microbatch
