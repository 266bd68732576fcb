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
#include "microbatch/optim/one_pass.h"

namespace microbatch {
namespace {

void validate_group(const char* optimizer, const ParameterGroup& group) {
    validate_setting(optimizer, "weight decay", group.weight_decay);
    validate_setting(optimizer, "learning rate scale", group.learning_rate_scale);
    for (const auto& [name, tensor] : group.parameters) {
        require_that(tensor.defined() && tensor.is_floating_point() && tensor.is_non_overlapping_and_dense(), optimizer,
                     ": parameter ", name, " must be a dense floating-point tensor");
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
    require_that(gradient.layout() == at::kStrided, "parameter ", parameter.name,
                 " has a sparse gradient; create its embedding with sparse = false");
    require_that(gradient.scalar_type() == parameter.tensor.scalar_type(), "parameter ", parameter.name, " is ",
                 parameter.tensor.scalar_type(), ", but its gradient is ", gradient.scalar_type());
    require_that(gradient.sizes() == parameter.tensor.sizes(), "parameter ", parameter.name, " has the shape ",
                 parameter.tensor.sizes(), ", but its gradient has ", gradient.sizes());
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
    throw Error(ErrorKind::usage, "parameter ", parameter.name, " is now ", tensor.scalar_type(), " of shape ",
                tensor.sizes(), ", unlike when its state was created: create a new optimizer");
}

}  // namespace

FusedOptimizer::FusedOptimizer(const char* name, const std::vector<ParameterGroup>& groups, double learning_rate)
    : name_(name), learning_rate_(learning_rate) {
    validate_setting(name, "learning rate", learning_rate);
    for (const ParameterGroup& group : groups) add_group(group);
}

void FusedOptimizer::add_group(const ParameterGroup& group) {
    validate_group(name_, group);
    const std::vector<at::Tensor> known = parameters();
    std::vector<Slot> made = slots_;
    for (const Parameter& parameter : without_repeats(group.parameters)) {
        for (const at::Tensor& tensor : known) {
            require_that(!tensor.is_same(parameter.tensor), name_, ": parameter ", parameter.name,
                         " is already in another group");
        }
        made.push_back({parameter, group_count_, group.weight_decay, group.learning_rate_scale});
    }
    slots_ = std::move(made);
    ++group_count_;
}

void FusedOptimizer::set_group(std::size_t group, double learning_rate_scale, double weight_decay) {
    require_that(group < group_count_, name_, ": there is no group ", group, ": it has ", group_count_);
    validate_setting(name_, "weight decay", weight_decay);
    validate_setting(name_, "learning rate scale", learning_rate_scale);
    for (Slot& slot : slots_) {
        if (slot.group != group) continue;
        slot.learning_rate_scale = learning_rate_scale;
        slot.weight_decay = weight_decay;
    }
}

void FusedOptimizer::set_learning_rate(double rate) {
    validate_setting(name_, "learning rate", rate);
    learning_rate_ = rate;
}

std::vector<at::Tensor> FusedOptimizer::parameters() const {
    std::vector<at::Tensor> result;
    for (const Slot& slot : slots_) result.push_back(slot.parameter.tensor);
    return result;
}

void FusedOptimizer::update_only(const std::vector<at::Tensor>& parameters) {
    restrict_to(parameters);
    for (Slot& slot : slots_) {
        if (!updates(slot.parameter.tensor)) slot.state.clear();
    }
}

bool FusedOptimizer::keeps(std::string_view name) const {
    const std::string_view parameter = name.substr(0, name.rfind('/'));
    return std::ranges::none_of(
        slots_, [&](const Slot& slot) { return slot.parameter.name == parameter && !updates(slot.parameter.tensor); });
}

void FusedOptimizer::step(std::span<const GradientView> gradients, double divisor) {
    const at::NoGradGuard no_grad;
    Buckets buckets = make_buckets(gradients, divisor, &Slot::state);
    update_buckets(buckets);
}

void FusedOptimizer::reserve(std::span<const GradientView> gradients) {
    const at::NoGradGuard no_grad;
    make_buckets(gradients, /*divisor=*/1.0, &Slot::state);
}

void FusedOptimizer::dry_run(std::span<const GradientView> gradients, double divisor) {
    const at::NoGradGuard no_grad;
    Buckets buckets = make_buckets(gradients, divisor, &Slot::dry_run_state);
    for (Bucket& bucket : buckets) bucket.parameters = bucket.gradients;
    update_buckets(buckets);
}

void FusedOptimizer::end_dry_run() {
    for (Slot& slot : slots_) slot.dry_run_state.clear();
}

bool FusedOptimizer::has_state() const {
    bool any = false;
    for (const Slot& slot : slots_) {
        const at::Tensor& parameter = slot.parameter.tensor;
        if (slot.state.empty() && parameter.requires_grad() && updates(parameter)) return false;
        any = any || !slot.state.empty();
    }
    return any;
}

void FusedOptimizer::save(const StateWriter& writer) const {
    for (const Slot& slot : slots_) {
        const StateWriter section = writer.section(slot.parameter.name);
        for (std::size_t i = 0; i < slot.state.size(); ++i) section.put(std::to_string(i), slot.state[i]);
    }
}

Commit FusedOptimizer::prepare(const StateReader& reader) {
    std::vector<std::pair<Slot*, std::vector<StoredTensor>>> states;
    std::size_t known = 0;
    for (Slot& slot : slots_) {
        std::vector<StoredTensor> state = state_of(slot, reader);
        known += state.size();
        if (updates(slot.parameter.tensor)) states.emplace_back(&slot, std::move(state));
    }
    if (known != reader.tensors().size()) {
        throw Error(ErrorKind::bad_data, name_, ": the state belongs to other parameters: it has ",
                    reader.tensors().size(), " tensors, of which ", known, " belong here");
    }
    return [this, states = std::move(states)] {
        const at::NoGradGuard no_grad;
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
        throw Error(ErrorKind::bad_data, name_, ": a state tensor of parameter ", name, " is ", tensor.scalar_type(),
                    " of shape ", tensor.sizes(), ", not ", wanted.scalar_type(), " of shape ", wanted.sizes(),
                    " with the memory layout of the parameter");
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

FusedOptimizer::Buckets FusedOptimizer::make_buckets(std::span<const GradientView> gradients, double divisor,
                                                     State state) {
    std::unordered_map<const void*, at::Tensor> sums;
    for (const GradientView& one : gradients) sums.emplace(one.parameter.unsafeGetTensorImpl(), one.sum);
    Buckets buckets;
    std::vector<Slot*> without_state;
    try {
        for (Slot& slot : slots_) {
            const at::Tensor& parameter = slot.parameter.tensor;
            const auto sum = sums.find(parameter.unsafeGetTensorImpl());
            if (sum == sums.end() || !sum->second.defined() || !updates(parameter)) continue;
            std::vector<at::Tensor>& tensors = slot.*state;
            if (tensors.empty()) {
                without_state.push_back(&slot);
                tensors = make_state(parameter);
            }
            Bucket& bucket = bucket_for(slot, divisor, buckets);
            bucket.gradients.push_back(dense_gradient(slot.parameter, sum->second));
            bucket.parameters.push_back(parameter);
            parameter.mutable_data_ptr();  // performs a pending copy-on-write now
            bucket.state.resize(tensors.size());
            for (std::size_t i = 0; i < tensors.size(); ++i) {
                require_same_layout(slot.parameter, tensors[i]);
                bucket.state[i].push_back(tensors[i]);
            }
        }
        for (Bucket& bucket : buckets) {
            if (updates_in_one_pass(bucket.parameters.front())) continue;
            bucket.constant = make_constant(bucket);
            if (divisor != 1.0) at::_foreach_div_(bucket.gradients, divisor);
        }
    } catch (...) {
        for (Slot* slot : without_state) (slot->*state).clear();
        throw;
    }
    return buckets;
}

FusedOptimizer::Bucket& FusedOptimizer::bucket_for(const Slot& slot, double divisor, Buckets& buckets) const {
    const at::Tensor& parameter = slot.parameter.tensor;
    Bucket made{learning_rate_ * slot.learning_rate_scale, slot.weight_decay, divisor};
    const auto belongs = [&](const Bucket& bucket) {
        const at::Tensor& first = bucket.parameters.front();
        return bucket.learning_rate == made.learning_rate && bucket.weight_decay == made.weight_decay &&
               first.device() == parameter.device() && first.scalar_type() == parameter.scalar_type();
    };
    const auto found = std::find_if(buckets.begin(), buckets.end(), belongs);
    return found != buckets.end() ? *found : buckets.emplace_back(std::move(made));
}

void FusedOptimizer::update_buckets(Buckets& buckets) const {
    for (Bucket& bucket : buckets) {
        if (updates_in_one_pass(bucket.parameters.front())) {
            update(bucket);
        } else {
            update_by_torch(bucket);
        }
        // So that a graph that has saved a parameter notices the change. Torch's fused operators do not tell it.
        for (const at::Tensor& parameter : bucket.parameters) parameter.unsafeGetTensorImpl()->bump_version();
    }
}

}  // namespace microbatch
