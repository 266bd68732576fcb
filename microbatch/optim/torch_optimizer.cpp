#include "microbatch/optim/torch_optimizer.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/_foreach_div.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <c10/util/Exception.h>
#include <torch/optim/adagrad.h>
#include <torch/optim/adam.h>
#include <torch/optim/adamw.h>
#include <torch/optim/rmsprop.h>
#include <torch/optim/sgd.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"

namespace microbatch {

TorchOptimizer::TorchOptimizer(torch::optim::Optimizer& optimizer) : optimizer_(optimizer) {
    if (optimizer_.param_groups().empty()) throw Error(ErrorKind::usage, "the torch optimizer has no parameter group");
    const double first = learning_rate();
    for (const auto& group : optimizer_.param_groups()) {
        scales_.push_back(first == 0.0 ? 1.0 : group.options().get_lr() / first);
    }
}

void TorchOptimizer::step(double divisor) {
    divide_gradients(divisor);
    try {
        optimizer_.step();
    } catch (const c10::OutOfMemoryError& error) {
        throw Error(
            ErrorKind::does_not_fit,
            str_cat("the torch optimizer ran out of memory between its updates, and some parameters may have been "
                    "updated: go on from weights that were saved before, with a larger budget (AdamW and Sgd of "
                    "this library update all or none); ",
                    error.what_without_backtrace()));
    }
}

namespace {

using States = std::vector<std::unique_ptr<torch::optim::OptimizerParamState>>;

// Puts gradients in the place of the parameters, and other states in the place of theirs; puts all back at its end.
class StandIns {
public:
    StandIns(torch::optim::Optimizer& optimizer, States& states) : optimizer_(optimizer), states_(states) {
        state_.swap(optimizer_.state());
        std::size_t i = 0;
        for (auto& group : optimizer_.param_groups()) {
            parameters_.push_back(group.params());
            for (at::Tensor& parameter : group.params()) {
                if (parameter.grad().defined()) parameter = stand_in(parameter.grad());
                if (states_.size() <= i) states_.emplace_back();
                if (states_[i]) optimizer_.state()[parameter.unsafeGetTensorImpl()] = std::move(states_[i]);
                ++i;
            }
        }
    }
    StandIns(const StandIns&) = delete;
    StandIns& operator=(const StandIns&) = delete;
    ~StandIns() {
        std::size_t i = 0;
        auto& groups = optimizer_.param_groups();
        for (std::size_t g = 0; g < groups.size(); ++g) {
            for (const at::Tensor& parameter : groups[g].params()) {
                const auto made = optimizer_.state().find(parameter.unsafeGetTensorImpl());
                if (made != optimizer_.state().end()) states_[i] = std::move(made->second);
                ++i;
            }
            groups[g].params() = parameters_[g];
        }
        optimizer_.state().swap(state_);
    }

private:
    static at::Tensor stand_in(const at::Tensor& gradient) {
        at::Tensor result = gradient.detach();
        result.mutable_grad() = gradient;
        return result.set_requires_grad(true);
    }

    torch::optim::Optimizer& optimizer_;
    States& states_;
    std::vector<std::vector<at::Tensor>> parameters_;
    std::remove_reference_t<decltype(std::declval<torch::optim::Optimizer&>().state())> state_;
};

}  // namespace

void TorchOptimizer::dry_run(double divisor) {
    divide_gradients(divisor);
    const StandIns stand_ins(optimizer_, dry_run_state_);
    optimizer_.step();
}

void TorchOptimizer::divide_gradients(double divisor) const {
    if (divisor == 1.0) return;
    const at::NoGradGuard no_grad;
    std::vector<at::Tensor> gradients;
    for (const at::Tensor& parameter : parameters()) {
        if (parameter.grad().defined()) gradients.push_back(parameter.grad());
    }
    if (!gradients.empty()) at::_foreach_div_(gradients, divisor);
}

bool TorchOptimizer::has_state() const {
    const std::vector<at::Tensor> all = parameters();
    return !all.empty() && std::all_of(all.begin(), all.end(), [this](const at::Tensor& parameter) {
        return !parameter.requires_grad() || optimizer_.state().count(parameter.unsafeGetTensorImpl()) > 0;
    });
}

namespace {

using ParamState = torch::optim::OptimizerParamState;

/// What torch keeps of a parameter, in a fixed order.
struct Fields {
    std::int64_t* step;
    std::vector<at::Tensor*> tensors;
};

std::optional<Fields> fields_of(ParamState& state) {
    if (auto* adamw = dynamic_cast<torch::optim::AdamWParamState*>(&state)) {
        return Fields{&adamw->step(), {&adamw->exp_avg(), &adamw->exp_avg_sq(), &adamw->max_exp_avg_sq()}};
    }
    if (auto* adam = dynamic_cast<torch::optim::AdamParamState*>(&state)) {
        return Fields{&adam->step(), {&adam->exp_avg(), &adam->exp_avg_sq(), &adam->max_exp_avg_sq()}};
    }
    if (auto* sgd = dynamic_cast<torch::optim::SGDParamState*>(&state)) {
        return Fields{nullptr, {&sgd->momentum_buffer()}};
    }
    if (auto* rms = dynamic_cast<torch::optim::RMSpropParamState*>(&state)) {
        return Fields{&rms->step(), {&rms->square_avg(), &rms->momentum_buffer(), &rms->grad_avg()}};
    }
    if (auto* adagrad = dynamic_cast<torch::optim::AdagradParamState*>(&state)) {
        return Fields{&adagrad->step(), {&adagrad->sum()}};
    }
    return std::nullopt;
}

// Which of the tensors there must be, by what the optimizer is to do with them.
std::vector<bool> needed_tensors(const torch::optim::OptimizerOptions& options) {
    if (const auto* adamw = dynamic_cast<const torch::optim::AdamWOptions*>(&options)) {
        return {true, true, adamw->amsgrad()};
    }
    if (const auto* adam = dynamic_cast<const torch::optim::AdamOptions*>(&options)) {
        return {true, true, adam->amsgrad()};
    }
    if (const auto* rms = dynamic_cast<const torch::optim::RMSpropOptions*>(&options)) {
        return {true, rms->momentum() > 0.0, rms->centered()};
    }
    return {true};
}

std::unique_ptr<ParamState> new_state(const torch::optim::Optimizer& optimizer) {
    if (dynamic_cast<const torch::optim::AdamW*>(&optimizer)) return std::make_unique<torch::optim::AdamWParamState>();
    if (dynamic_cast<const torch::optim::Adam*>(&optimizer)) return std::make_unique<torch::optim::AdamParamState>();
    if (dynamic_cast<const torch::optim::SGD*>(&optimizer)) return std::make_unique<torch::optim::SGDParamState>();
    if (dynamic_cast<const torch::optim::RMSprop*>(&optimizer)) {
        return std::make_unique<torch::optim::RMSpropParamState>();
    }
    if (dynamic_cast<const torch::optim::Adagrad*>(&optimizer)) {
        return std::make_unique<torch::optim::AdagradParamState>();
    }
    return nullptr;
}

[[noreturn]] void refuse_kind() {
    throw Error(ErrorKind::usage,
                "the state of this torch optimizer cannot be kept: it can of Adam, AdamW, SGD, RMSprop and Adagrad, "
                "and of this library's own");
}

// In the place of a tensor that torch has none of: no state of a parameter is of bytes.
at::Tensor missing() {
    return at::empty({0}, at::kByte);
}

bool is_missing(const at::Tensor& tensor) {
    return tensor.scalar_type() == at::kByte && tensor.numel() == 0;
}

bool fits(const std::vector<at::Tensor>& tensors, const Fields& fields, const at::Tensor& parameter,
          const std::vector<bool>& wanted) {
    const std::size_t steps = fields.step != nullptr ? 1 : 0;
    if (tensors.size() != steps + fields.tensors.size()) return false;
    if (steps == 1 && (tensors[0].scalar_type() != at::kLong || tensors[0].numel() != 1)) return false;
    for (std::size_t i = 0; i < fields.tensors.size(); ++i) {
        const at::Tensor& tensor = tensors[steps + i];
        if (!wanted[i] && is_missing(tensor)) continue;
        if (tensor.sizes() != parameter.sizes() || tensor.scalar_type() != parameter.scalar_type()) return false;
    }
    return true;
}

}  // namespace

OptimizerState TorchOptimizer::state() const {
    OptimizerState result;
    for (const at::Tensor& parameter : parameters()) {
        std::vector<at::Tensor>& tensors = result.emplace_back();
        const auto found = optimizer_.state().find(parameter.unsafeGetTensorImpl());
        if (found == optimizer_.state().end() || !found->second) continue;
        const std::optional<Fields> fields = fields_of(*found->second);
        if (!fields) refuse_kind();
        if (fields->step != nullptr) tensors.push_back(at::scalar_tensor(*fields->step, at::kLong));
        for (const at::Tensor* tensor : fields->tensors) tensors.push_back(tensor->defined() ? *tensor : missing());
    }
    return result;
}

void TorchOptimizer::require_state(const OptimizerState& state) const {
    const std::vector<at::Tensor> all = parameters();
    const std::unique_ptr<ParamState> made = new_state(optimizer_);
    if (!made) refuse_kind();
    const Fields fields = *fields_of(*made);
    // Torch makes Adagrad's with the optimizer, others' in the first step.
    const bool may_be_empty = dynamic_cast<const torch::optim::Adagrad*>(&optimizer_) == nullptr;
    bool sound = state.size() == all.size();
    std::size_t i = 0;
    for (const auto& group : optimizer_.param_groups()) {
        const std::vector<bool> wanted = needed_tensors(group.options());
        for (const at::Tensor& parameter : group.params()) {
            if (!sound) break;
            const std::vector<at::Tensor>& tensors = state[i++];
            sound = tensors.empty() ? may_be_empty : fits(tensors, fields, parameter, wanted);
        }
    }
    if (sound) return;
    throw Error(ErrorKind::usage, "this is not the state of such a torch optimizer");
}

void TorchOptimizer::restore(const OptimizerState& state) {
    require_state(state);
    const at::NoGradGuard no_grad;
    std::remove_reference_t<decltype(optimizer_.state())> restored;
    const std::vector<at::Tensor> all = parameters();
    for (std::size_t i = 0; i < all.size(); ++i) {
        if (state[i].empty()) continue;
        std::unique_ptr<ParamState> made = new_state(optimizer_);
        const Fields fields = *fields_of(*made);
        auto next = state[i].begin();
        if (fields.step != nullptr) *fields.step = (next++)->item<std::int64_t>();
        for (at::Tensor* tensor : fields.tensors) {
            if (!is_missing(*next)) *tensor = next->to(all[i].options(), /*non_blocking=*/false, /*copy=*/true);
            ++next;
        }
        restored[all[i].unsafeGetTensorImpl()] = std::move(made);
    }
    optimizer_.state() = std::move(restored);
}

double TorchOptimizer::learning_rate() const {
    return optimizer_.param_groups().front().options().get_lr();
}

void TorchOptimizer::set_learning_rate(double rate) {
    validate_setting("TorchOptimizer", "learning rate", rate);
    scales_.resize(optimizer_.param_groups().size(), 1.0);
    for (std::size_t i = 0; i < scales_.size(); ++i) optimizer_.param_groups()[i].options().set_lr(rate * scales_[i]);
}

std::vector<at::Tensor> TorchOptimizer::parameters() const {
    std::vector<at::Tensor> result;
    for (const auto& group : optimizer_.param_groups()) {
        result.insert(result.end(), group.params().begin(), group.params().end());
    }
    return result;
}

}  // namespace microbatch
