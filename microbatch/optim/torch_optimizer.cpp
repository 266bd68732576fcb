#include "microbatch/optim/torch_optimizer.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/_foreach_div.h>
#include <c10/util/Exception.h>
#include <torch/optim/adagrad.h>
#include <torch/optim/adam.h>
#include <torch/optim/adamw.h>
#include <torch/optim/rmsprop.h>
#include <torch/optim/sgd.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
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

namespace {

// Torch's optimizers read .grad: during a step, it has the divided gradients.
class GradientsInPlace {
public:
    GradientsInPlace(const std::vector<at::Tensor>& parameters, std::span<const GradientView> gradients, double divisor)
        : parameters_(parameters) {
        const at::NoGradGuard no_grad;
        std::vector<at::Tensor> divided;
        for (const at::Tensor& parameter : parameters_) {
            before_.push_back(parameter.grad());
            parameter.mutable_grad() = at::Tensor();
        }
        for (const GradientView& view : gradients) {
            const auto is_view = [&view](const at::Tensor& parameter) { return parameter.is_same(view.parameter); };
            if (std::none_of(parameters_.begin(), parameters_.end(), is_view)) continue;
            view.parameter.mutable_grad() = view.sum;
            divided.push_back(view.sum);
        }
        if (divisor != 1.0 && !divided.empty()) at::_foreach_div_(divided, divisor);
    }
    GradientsInPlace(const GradientsInPlace&) = delete;
    GradientsInPlace& operator=(const GradientsInPlace&) = delete;
    ~GradientsInPlace() {
        for (std::size_t i = 0; i < parameters_.size(); ++i) parameters_[i].mutable_grad() = before_[i];
    }

private:
    std::vector<at::Tensor> parameters_, before_;
};

}  // namespace

void TorchOptimizer::step(std::span<const GradientView> gradients, double divisor) {
    const GradientsInPlace in_place(parameters(), gradients, divisor);
    try {
        optimizer_.step();
    } catch (const c10::OutOfMemoryError& error) {
        throw Error(
            ErrorKind::does_not_fit,
            str_cat("the torch optimizer ran out of memory between its updates, and some parameters may have been "
                    "updated: continue from saved weights with a larger budget (this library's AdamW and Sgd "
                    "update all parameters or none); ",
                    error.what_without_backtrace()));
    }
}

namespace {

using States = std::vector<std::unique_ptr<torch::optim::OptimizerParamState>>;

// Puts gradients in the place of the parameters, and temporary states in the place of theirs; restores all at its end.
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

void TorchOptimizer::dry_run(std::span<const GradientView> gradients, double divisor) {
    const GradientsInPlace in_place(parameters(), gradients, divisor);
    const StandIns stand_ins(optimizer_, dry_run_state_);
    optimizer_.step();
}

bool TorchOptimizer::has_state() const {
    const std::vector<at::Tensor> all = parameters();
    return !all.empty() && std::all_of(all.begin(), all.end(), [this](const at::Tensor& parameter) {
        return !parameter.requires_grad() || optimizer_.state().count(parameter.unsafeGetTensorImpl()) > 0;
    });
}

namespace {

using ParamState = torch::optim::OptimizerParamState;

/// Torch's state of a parameter.
struct Fields {
    std::int64_t* step;
    std::vector<std::pair<const char*, at::Tensor*>> tensors;
};

std::optional<Fields> fields_of(ParamState& state) {
    const auto adam_fields = [](auto& adam) {
        return Fields{&adam.step(),
                      {{"exp_avg", &adam.exp_avg()},
                       {"exp_avg_sq", &adam.exp_avg_sq()},
                       {"max_exp_avg_sq", &adam.max_exp_avg_sq()}}};
    };
    if (auto* adamw = dynamic_cast<torch::optim::AdamWParamState*>(&state)) return adam_fields(*adamw);
    if (auto* adam = dynamic_cast<torch::optim::AdamParamState*>(&state)) return adam_fields(*adam);
    if (auto* sgd = dynamic_cast<torch::optim::SGDParamState*>(&state)) {
        return Fields{nullptr, {{"momentum_buffer", &sgd->momentum_buffer()}}};
    }
    if (auto* rms = dynamic_cast<torch::optim::RMSpropParamState*>(&state)) {
        return Fields{&rms->step(),
                      {{"square_avg", &rms->square_avg()},
                       {"momentum_buffer", &rms->momentum_buffer()},
                       {"grad_avg", &rms->grad_avg()}}};
    }
    if (auto* adagrad = dynamic_cast<torch::optim::AdagradParamState*>(&state)) {
        return Fields{&adagrad->step(), {{"sum", &adagrad->sum()}}};
    }
    return std::nullopt;
}

// Which tensors must exist, by the settings of the optimizer.
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
                "the state of this torch optimizer cannot be saved; use Adam, AdamW, SGD, RMSprop or Adagrad, "
                "or an optimizer of this library");
}

// The state of a parameter, as read; null if it does not match the optimizer and the parameter.
std::unique_ptr<ParamState> read_state(const torch::optim::Optimizer& optimizer, const StateReader& reader,
                                       const at::Tensor& parameter, const std::vector<bool>& needed, bool with_values) {
    std::unique_ptr<ParamState> state = new_state(optimizer);
    const Fields fields = *fields_of(*state);
    if (fields.step != nullptr) *fields.step = reader.count("step");
    std::size_t known = 0;
    for (std::size_t i = 0; i < fields.tensors.size(); ++i) {
        const auto [name, tensor] = fields.tensors[i];
        if (!reader.has(name) && !needed[i]) continue;
        ++known;
        const StoredTensor& stored = reader.tensor(name);
        if (stored.shape().sizes() != parameter.sizes() || stored.shape().scalar_type() != parameter.scalar_type()) {
            reader.refuse(name, "its shape or dtype differs from the parameter");
        }
        if (with_values) *tensor = stored.get_own().to(parameter.options());
    }
    if (known != reader.tensors().size()) reader.refuse("", "it has tensors that this optimizer does not have");
    return state;
}

}  // namespace

void TorchOptimizer::save(const StateWriter& writer) const {
    const std::vector<at::Tensor> all = parameters();
    for (std::size_t i = 0; i < all.size(); ++i) {
        const auto found = optimizer_.state().find(all[i].unsafeGetTensorImpl());
        if (found == optimizer_.state().end() || !found->second) continue;
        const std::optional<Fields> fields = fields_of(*found->second);
        if (!fields) refuse_kind();
        const StateWriter section = writer.section(std::to_string(i));
        if (fields->step != nullptr) section.put("step", *fields->step);
        for (const auto& [name, tensor] : fields->tensors) {
            if (tensor->defined()) section.put(name, *tensor);
        }
    }
}

Commit TorchOptimizer::prepare(const StateReader& reader) {
    if (!new_state(optimizer_)) refuse_kind();
    struct One {
        at::Tensor parameter;
        StateReader reader;
        std::vector<bool> needed;
    };
    // Torch creates Adagrad's state at construction, others' in the first step.
    const bool may_be_empty = dynamic_cast<const torch::optim::Adagrad*>(&optimizer_) == nullptr;
    std::vector<One> states;
    std::size_t number = 0, known = 0;
    for (const auto& group : optimizer_.param_groups()) {
        const std::vector<bool> needed = needed_tensors(group.options());
        for (const at::Tensor& parameter : group.params()) {
            const StateReader section = reader.section(std::to_string(number++));
            if (!section.exists() && may_be_empty) continue;
            read_state(optimizer_, section, parameter, needed, /*with_values=*/false);
            known += section.tensors().size();
            states.push_back({parameter, section, needed});
        }
    }
    if (known != reader.tensors().size()) reader.refuse("", "it belongs to the parameters of another torch optimizer");
    return [this, states = std::move(states)] {
        const at::NoGradGuard no_grad;
        std::remove_reference_t<decltype(optimizer_.state())> restored;
        for (const One& one : states) {
            restored[one.parameter.unsafeGetTensorImpl()] =
                read_state(optimizer_, one.reader, one.parameter, one.needed, /*with_values=*/true);
        }
        optimizer_.state() = std::move(restored);
    };
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
