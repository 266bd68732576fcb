#include "microbatch/optim/fused_optimizer.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_like.h>

#include <cmath>
#include <map>
#include <string>
#include <utility>

#include "microbatch/core/error.h"
#include "microbatch/core/text.h"

namespace microbatch {
namespace {

void validate_group(const char* optimizer, const ParameterGroup& group) {
    validate_setting(optimizer, "weight decay", group.weight_decay);
    validate_setting(optimizer, "learning rate scale", group.learning_rate_scale);
    for (const auto& [name, tensor] : group.parameters) {
        if (!tensor.defined() || !tensor.is_floating_point() || !tensor.is_non_overlapping_and_dense()) {
            throw Error(ErrorKind::usage,
                        text(optimizer, ": parameter ", name, " must be a dense floating-point tensor"));
        }
    }
}

// The gradient laid out as the parameter is, which the fused kernels take for granted.
at::Tensor dense_gradient(const Parameter& parameter) {
    const at::Tensor& gradient = parameter.tensor.grad();
    if (gradient.layout() != at::kStrided) {
        throw Error(ErrorKind::usage, text("parameter ", parameter.name,
                                           " has a sparse gradient; make its embedding with sparse = false"));
    }
    if (gradient.scalar_type() != parameter.tensor.scalar_type()) {
        throw Error(ErrorKind::usage, text("parameter ", parameter.name, " is ", parameter.tensor.scalar_type(),
                                           ", its gradient ", gradient.scalar_type()));
    }
    if (gradient.strides() == parameter.tensor.strides()) return gradient;
    return at::empty_like(parameter.tensor).copy_(gradient);
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
    Group made{{}, group.weight_decay, group.learning_rate_scale};
    for (const Parameter& parameter : without_repeats(group.parameters)) {
        for (const at::Tensor& tensor : known) {
            if (tensor.is_same(parameter.tensor)) {
                throw Error(ErrorKind::usage,
                            text(name_, ": parameter ", parameter.name, " is in another group already"));
            }
        }
        made.slots.push_back({parameter, {}, {}});
    }
    groups_.push_back(std::move(made));
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

void FusedOptimizer::step() {
    at::NoGradGuard no_grad;
    // All buckets before any update: a gradient that is refused leaves every parameter as it was.
    auto buckets = prepare(&Slot::state);
    update_all(buckets);
}

void FusedOptimizer::rehearse() {
    at::NoGradGuard no_grad;
    auto buckets = prepare(&Slot::rehearsed_state);
    for (auto& group : buckets) {
        for (Bucket& bucket : group) bucket.parameters = bucket.gradients;
    }
    update_all(buckets);
}

void FusedOptimizer::end_rehearsal() {
    for (Group& group : groups_) {
        for (Slot& slot : group.slots) slot.rehearsed_state.clear();
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

std::vector<std::vector<FusedOptimizer::Bucket>> FusedOptimizer::prepare(State state) {
    std::vector<Slot*> without_state;
    for (Group& group : groups_) {
        for (Slot& slot : group.slots) {
            if ((slot.*state).empty()) without_state.push_back(&slot);
        }
    }
    try {
        std::vector<std::vector<Bucket>> buckets;
        for (Group& group : groups_) buckets.push_back(buckets_of(group, state));
        return buckets;
    } catch (...) {
        for (Slot* slot : without_state) (slot->*state).clear();
        throw;
    }
}

std::vector<FusedOptimizer::Bucket> FusedOptimizer::buckets_of(Group& group, State state) const {
    std::map<std::pair<std::string, at::ScalarType>, Bucket> buckets;
    for (Slot& slot : group.slots) {
        const at::Tensor& parameter = slot.parameter.tensor;
        if (!parameter.grad().defined()) continue;
        const at::Tensor gradient = dense_gradient(slot.parameter);
        std::vector<at::Tensor>& tensors = slot.*state;
        if (tensors.empty()) tensors = make_state(parameter);
        Bucket& bucket = buckets[{parameter.device().str(), parameter.scalar_type()}];
        if (!bucket.constant.defined()) {
            bucket.constant = make_constant(parameter, rate_of(group), group.weight_decay);
        }
        bucket.parameters.push_back(parameter);
        bucket.gradients.push_back(gradient);
        bucket.state.resize(tensors.size());
        for (std::size_t i = 0; i < tensors.size(); ++i) bucket.state[i].push_back(tensors[i]);
    }
    std::vector<Bucket> result;
    for (auto& [key, bucket] : buckets) result.push_back(std::move(bucket));
    return result;
}

void FusedOptimizer::update_all(std::vector<std::vector<Bucket>>& buckets) const {
    for (std::size_t i = 0; i < groups_.size(); ++i) {
        const Group& group = groups_[i];
        for (Bucket& bucket : buckets[i]) {
            update(bucket, rate_of(group), group.weight_decay);
        }
    }
}

}  // namespace microbatch
