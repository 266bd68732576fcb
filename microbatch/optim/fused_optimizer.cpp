#include "microbatch/optim/fused_optimizer.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/_foreach_div.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <unordered_map>
#include <utility>

#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"
#include "microbatch/optim/one_pass.h"

namespace microbatch {
namespace {

void validate_group(const char* optimizer, const ParameterGroup& group) {
    validate_setting(optimizer, "weight decay", group.weight_decay);
    validate_setting(optimizer, "learning rate scale", group.learning_rate_scale);
    for (const auto& [name, tensor] : group.parameters) {
        if (!tensor.defined() || !tensor.is_floating_point() || !tensor.is_non_overlapping_and_dense()) {
            throw Error(ErrorKind::usage,
                        str_cat(optimizer, ": parameter ", name, " must be a dense floating-point tensor"));
        }
    }
}

// True if tensors of one shape have the same memory layout. The stride of a dimension of size 1 is ignored: for the
// gradient of a 1x1 convolution, it differs from the weight's.
bool same_layout(const at::Tensor& left, const at::Tensor& right) {
    for (std::int64_t i = 0; i < left.dim(); ++i) {
        if (left.size(i) != 1 && left.stride(i) != right.stride(i)) return false;
    }
    return true;
}

// The gradient in the memory layout of the parameter, which every update requires.
at::Tensor dense_gradient(const Parameter& parameter, const at::Tensor& gradient) {
    if (gradient.layout() != at::kStrided) {
        throw Error(ErrorKind::usage, str_cat("parameter ", parameter.name,
                                              " has a sparse gradient; create its embedding with sparse = false"));
    }
    if (gradient.scalar_type() != parameter.tensor.scalar_type()) {
        throw Error(ErrorKind::usage, str_cat("parameter ", parameter.name, " is ", parameter.tensor.scalar_type(),
                                              ", but its gradient is ", gradient.scalar_type()));
    }
    if (gradient.sizes() != parameter.tensor.sizes()) {
        throw Error(ErrorKind::usage, str_cat("parameter ", parameter.name, " has the shape ", parameter.tensor.sizes(),
                                              ", but its gradient has ", gradient.sizes()));
    }
    if (same_layout(gradient, parameter.tensor)) return gradient;
    return at::empty_like(parameter.tensor).copy_(gradient);
}

// Applies to tensors of the parameter's size, not to a step count.
void require_same_layout(const Parameter& parameter, const at::Tensor& state) {
    const at::Tensor& tensor = parameter.tensor;
    if (state.dim() == 0 && tensor.dim() > 0) return;
    if (state.sizes() == tensor.sizes() && same_layout(state, tensor) &&
        (state.dim() == 0 || state.scalar_type() == tensor.scalar_type())) {
        return;
    }
    throw Error(ErrorKind::usage,
                str_cat("parameter ", parameter.name, " is now ", tensor.scalar_type(), " of shape ", tensor.sizes(),
                        ", unlike when its state was created: create a new optimizer"));
}

}  // namespace

/// Releases the gradients at the end of a step, however it ends.
struct FusedOptimizer::Forget {
    std::vector<Group>& groups;
    Parts& parts;

    Forget(std::vector<Group>& all, Parts& held) : groups(all), parts(held) {}
    Forget(const Forget&) = delete;
    Forget& operator=(const Forget&) = delete;
    ~Forget() {
        for (Part& part : parts) std::fill(part.bucket.gradients.begin(), part.bucket.gradients.end(), at::Tensor());
        for (Group& group : groups) {
            for (Slot& slot : group.slots) slot.gradient = at::Tensor();
        }
    }
};

FusedOptimizer::FusedOptimizer(const char* name, const std::vector<ParameterGroup>& groups, double learning_rate)
    : name_(name), learning_rate_(learning_rate) {
    validate_setting(name, "learning rate", learning_rate);
    for (const ParameterGroup& group : groups) add_group(group);
}

void FusedOptimizer::add_group(const ParameterGroup& group) {
    validate_group(name_, group);
    const std::vector<at::Tensor> known = parameters();
    Group made{{}, group.weight_decay, group.learning_rate_scale};
    for (const Parameter& parameter : without_repeats(group.parameters)) {
        for (const at::Tensor& tensor : known) {
            if (tensor.is_same(parameter.tensor)) {
                throw Error(ErrorKind::usage,
                            str_cat(name_, ": parameter ", parameter.name, " is already in another group"));
            }
        }
        made.slots.push_back({.parameter = parameter});
    }
    groups_.push_back(std::move(made));
    parts_.clear();
}

void FusedOptimizer::set_learning_rate(double rate) {
    validate_setting(name_, "learning rate", rate);
    learning_rate_ = rate;
}

std::vector<at::Tensor> FusedOptimizer::parameters() const {
    std::vector<at::Tensor> result;
    for (const Group& group : groups_) {
        for (const Slot& slot : group.slots) result.push_back(slot.parameter.tensor);
    }
    return result;
}

void FusedOptimizer::step(std::span<const GradientView> gradients, double divisor) {
    const at::NoGradGuard no_grad;
    const Forget forget{groups_, parts_};
    take(gradients);
    if (!still_right(parts_)) parts_ = make_parts(&Slot::state);
    // Everything is checked before any update: a refused gradient leaves every parameter unchanged.
    refresh(parts_, divisor);
    update_all(parts_, divisor);
}

void FusedOptimizer::dry_run(std::span<const GradientView> gradients, double divisor) {
    const at::NoGradGuard no_grad;
    Parts parts;
    const Forget forget{groups_, parts};
    take(gradients);
    parts = make_parts(&Slot::dry_run_state);
    refresh(parts, divisor);
    for (Part& part : parts) part.bucket.parameters = part.bucket.gradients;
    update_all(parts, divisor);
}

void FusedOptimizer::take(std::span<const GradientView> gradients) {
    std::unordered_map<const void*, const at::Tensor*> sums;
    for (const GradientView& one : gradients) sums.emplace(one.parameter.unsafeGetTensorImpl(), &one.sum);
    for (Group& group : groups_) {
        for (Slot& slot : group.slots) {
            const auto found = sums.find(slot.parameter.tensor.unsafeGetTensorImpl());
            if (found != sums.end()) slot.gradient = *found->second;
        }
    }
}

void FusedOptimizer::end_dry_run() {
    for (Group& group : groups_) {
        for (Slot& slot : group.slots) slot.dry_run_state.clear();
    }
}

bool FusedOptimizer::has_state() const {
    bool any = false;
    for (const Group& group : groups_) {
        for (const Slot& slot : group.slots) {
            if (slot.state.empty() && slot.parameter.tensor.requires_grad()) return false;
            any = any || !slot.state.empty();
        }
    }
    return any;
}

void FusedOptimizer::save(const StateWriter& writer) const {
    for (const Group& group : groups_) {
        for (const Slot& slot : group.slots) {
            const StateWriter section = writer.section(slot.parameter.name);
            for (std::size_t i = 0; i < slot.state.size(); ++i) section.put(std::to_string(i), slot.state[i]);
        }
    }
}

Commit FusedOptimizer::prepare(const StateReader& reader) {
    std::vector<std::pair<Slot*, std::vector<StoredTensor>>> states;
    std::size_t known = 0;
    for (Group& group : groups_) {
        for (Slot& slot : group.slots) {
            states.emplace_back(&slot, state_of(slot, reader));
            known += states.back().second.size();
        }
    }
    if (known != reader.tensors().size()) {
        throw Error(ErrorKind::bad_data,
                    str_cat(name_, ": the state belongs to other parameters: it has ", reader.tensors().size(),
                            " tensors, of which ", known, " belong here"));
    }
    return [this, states = std::move(states)] {
        const at::NoGradGuard no_grad;
        parts_.clear();  // they refer to the previous state
        for (const auto& [slot, state] : states) restore(*slot, state);
    };
}

std::vector<StoredTensor> FusedOptimizer::state_of(const Slot& slot, const StateReader& reader) const {
    const std::string& name = slot.parameter.name;
    const StateReader section = reader.section(name);
    std::vector<StoredTensor> state;
    if (!section.has("0")) return state;  // the optimizer has made no step yet
    for (const at::Tensor& wanted : make_state(at::empty_like(slot.parameter.tensor, at::TensorOptions(at::kMeta)))) {
        state.push_back(section.tensor(std::to_string(state.size())));
        const at::Tensor& tensor = state.back().shape();
        if (tensor.sizes() == wanted.sizes() && tensor.scalar_type() == wanted.scalar_type() &&
            same_layout(tensor, wanted)) {
            continue;
        }
        throw Error(ErrorKind::bad_data,
                    str_cat(name_, ": a state tensor of parameter ", name, " is ", tensor.scalar_type(), " of shape ",
                            tensor.sizes(), ", not ", wanted.scalar_type(), " of shape ", wanted.sizes(),
                            " with the memory layout of the parameter"));
    }
    return state;
}

// One tensor at a time; in place if there is already a state.
void FusedOptimizer::restore(Slot& slot, const std::vector<StoredTensor>& state) {
    if (slot.state.size() == state.size()) {
        for (std::size_t i = 0; i < state.size(); ++i) slot.state[i].copy_(state[i].get());
        return;
    }
    slot.state.clear();
    for (const StoredTensor& one : state) slot.state.push_back(one.get_own().to(slot.parameter.tensor.device()));
}

FusedOptimizer::Parts FusedOptimizer::make_parts(State state) {
    std::vector<Slot*> without_state;
    for (Group& group : groups_) {
        for (Slot& slot : group.slots) {
            if ((slot.*state).empty()) without_state.push_back(&slot);
        }
    }
    try {
        Parts parts;
        for (std::size_t i = 0; i < groups_.size(); ++i) {
            for (Slot& slot : groups_[i].slots) {
                if (slot.gradient.defined()) add_to(parts, slot, i, state);
            }
        }
        return parts;
    } catch (...) {
        for (Slot* slot : without_state) (slot->*state).clear();
        throw;
    }
}

void FusedOptimizer::add_to(Parts& parts, Slot& slot, std::size_t group, State state) const {
    const at::Tensor& parameter = slot.parameter.tensor;
    const auto belongs = [&](const Part& part) {
        const at::Tensor& first = part.bucket.parameters.front();
        return part.group == group && first.device() == parameter.device() &&
               first.scalar_type() == parameter.scalar_type();
    };
    auto part = std::find_if(parts.begin(), parts.end(), belongs);
    if (part == parts.end()) part = parts.insert(part, Part{{}, {}, group});
    std::vector<at::Tensor>& tensors = slot.*state;
    if (tensors.empty()) tensors = make_state(parameter);
    Bucket& bucket = part->bucket;
    part->slots.push_back(&slot);
    bucket.parameters.push_back(parameter);
    bucket.gradients.emplace_back();
    bucket.state.resize(tensors.size());
    for (std::size_t i = 0; i < tensors.size(); ++i) bucket.state[i].push_back(tensors[i]);
}

bool FusedOptimizer::still_right(const Parts& parts) const {
    std::size_t held = 0, with_gradient = 0;
    for (const Part& part : parts) {
        const at::Tensor& first = part.bucket.parameters.front();
        for (const Slot* slot : part.slots) {
            const at::Tensor& parameter = slot->parameter.tensor;
            if (!slot->gradient.defined() || parameter.device() != first.device() ||
                parameter.scalar_type() != first.scalar_type()) {
                return false;
            }
            ++held;
        }
    }
    for (const Group& group : groups_) {
        for (const Slot& slot : group.slots) with_gradient += slot.gradient.defined() ? 1 : 0;
    }
    return held == with_gradient;
}

void FusedOptimizer::refresh(Parts& parts, double divisor) const {
    for (Part& part : parts) {
        Bucket& bucket = part.bucket;
        for (std::size_t i = 0; i < part.slots.size(); ++i) {
            bucket.gradients[i] = dense_gradient(part.slots[i]->parameter, part.slots[i]->gradient);
            for (const auto& tensors : bucket.state) require_same_layout(part.slots[i]->parameter, tensors[i]);
            bucket.parameters[i].mutable_data_ptr();  // performs a pending copy-on-write now
        }
    }
    for (Part& part : parts) {
        Bucket& bucket = part.bucket;
        if (updates_in_one_pass(bucket.parameters.front())) continue;
        const Group& group = groups_[part.group];
        bucket.constant = make_constant(bucket.parameters.front(), rate_of(group), group.weight_decay);
        if (divisor != 1.0) at::_foreach_div_(bucket.gradients, divisor);
    }
}

void FusedOptimizer::update_all(Parts& parts, double divisor) const {
    for (Part& part : parts) {
        Bucket& bucket = part.bucket;
        const Group& group = groups_[part.group];
        const Settings settings{rate_of(group), group.weight_decay, divisor};
        if (updates_in_one_pass(bucket.parameters.front())) {
            update(bucket, settings);
            // As torch's own operators do, so that a graph that has saved the parameter notices the change.
            for (const at::Tensor& parameter : bucket.parameters) parameter.unsafeGetTensorImpl()->bump_version();
        } else {
            update_by_torch(bucket, settings);
        }
    }
}

}  // namespace microbatch
