#include "microbatch/optim/torch_optimizer.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/_foreach_div.h>
#include <c10/util/Exception.h>
#include <c10/util/ScopeExit.h>
#include <torch/optim/adagrad.h>
#include <torch/optim/adam.h>
#include <torch/optim/adamw.h>
#include <torch/optim/rmsprop.h>
#include <torch/optim/sgd.h>

#include <algorithm>
#include <array>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "microbatch/core/error.h"

namespace microbatch {

TorchOptimizer::TorchOptimizer(torch::optim::Optimizer& optimizer) : optimizer_(optimizer) {
    require_that(!optimizer_.param_groups().empty(), "the torch optimizer has no parameter group");
    const double first = learning_rate();
    for (const auto& group : optimizer_.param_groups()) {
        scales_.push_back(first == 0.0 ? 1.0 : group.options().get_lr() / first);
    }
}

namespace {

// Torch's optimizers read .grad: during a step, it has the divided gradients.
void place_gradients(const std::vector<at::Tensor>& parameters, std::span<const GradientView> gradients,
                     double divisor) {
    const at::NoGradGuard no_grad;
    std::vector<at::Tensor> divided;
    for (const GradientView& view : gradients) {
        const auto is_view = [&view](const at::Tensor& parameter) { return parameter.is_same(view.parameter); };
        if (std::none_of(parameters.begin(), parameters.end(), is_view)) continue;
        view.parameter.mutable_grad() = view.sum;
        divided.push_back(view.sum);
    }
    if (divisor != 1.0 && !divided.empty()) at::_foreach_div_(divided, divisor);
}

template <class Call>
void for_each_parameter(torch::optim::Optimizer& optimizer, const Call& call) {
    std::size_t i = 0;
    for (auto& group : optimizer.param_groups()) {
        for (at::Tensor& parameter : group.params()) call(parameter, i++);
    }
}

at::Tensor stand_in_for(const at::Tensor& gradient) {
    at::Tensor result = gradient.detach();
    result.mutable_grad() = gradient;
    return result.set_requires_grad(true);
}

}  // namespace

void TorchOptimizer::step(std::span<const GradientView> gradients, double divisor) {
    const ParkedGradients before(parameters());
    place_gradients(parameters(), updated(gradients), divisor);
    try {
        optimizer_.step();
    } catch (const c10::OutOfMemoryError& error) {
        throw Error(ErrorKind::does_not_fit,
                    "the torch optimizer ran out of memory between its updates, and some parameters may have been "
                    "updated: continue from saved weights with a larger budget (this library's AdamW and Sgd "
                    "update all parameters or none); ",
                    error.what_without_backtrace());
    }
}

void TorchOptimizer::dry_run(std::span<const GradientView> gradients, double divisor) {
    const std::vector<at::Tensor> own = parameters();
    const ParkedGradients before(own);
    place_gradients(own, updated(gradients), divisor);
    // Gradients stand in for the parameters, and other states for theirs.
    auto own_states = std::exchange(optimizer_.state(), {});
    dry_run_state_.resize(own.size());
    const auto put_back = c10::make_scope_exit([&] {
        for_each_parameter(optimizer_, [&](at::Tensor& parameter, std::size_t i) {
            const auto made = optimizer_.state().find(parameter.unsafeGetTensorImpl());
            if (made != optimizer_.state().end()) dry_run_state_[i] = std::move(made->second);
            parameter = own[i];
        });
        optimizer_.state() = std::move(own_states);
    });
    for_each_parameter(optimizer_, [&](at::Tensor& parameter, std::size_t i) {
        if (parameter.grad().defined()) parameter = stand_in_for(parameter.grad());
        if (dry_run_state_[i]) optimizer_.state()[parameter.unsafeGetTensorImpl()] = std::move(dry_run_state_[i]);
    });
    optimizer_.step();
}

bool TorchOptimizer::has_state() const {
    const std::vector<at::Tensor> all = parameters();
    return !all.empty() && std::all_of(all.begin(), all.end(), [this](const at::Tensor& parameter) {
        return !parameter.requires_grad() || !updates(parameter) ||
               optimizer_.state().count(parameter.unsafeGetTensorImpl()) > 0;
    });
}

namespace {

using ParamState = torch::optim::OptimizerParamState;
using Options = torch::optim::OptimizerOptions;

/// Torch's state of a parameter; which tensors must exist depends on the settings of the optimizer.
struct Fields {
    struct Field {
        const char* name;
        at::Tensor* tensor;
        bool needed;
    };
    std::int64_t* step;
    std::vector<Field> tensors;
};

template <class State, class Own>
Fields adam_fields(State& state, const Own& options) {
    return {&state.step(),
            {{"exp_avg", &state.exp_avg(), true},
             {"exp_avg_sq", &state.exp_avg_sq(), true},
             {"max_exp_avg_sq", &state.max_exp_avg_sq(), options.amsgrad()}}};
}
Fields fields_of(torch::optim::AdamParamState& state, const torch::optim::AdamOptions& options) {
    return adam_fields(state, options);
}
Fields fields_of(torch::optim::AdamWParamState& state, const torch::optim::AdamWOptions& options) {
    return adam_fields(state, options);
}
Fields fields_of(torch::optim::SGDParamState& state, const torch::optim::SGDOptions&) {
    return {nullptr, {{"momentum_buffer", &state.momentum_buffer(), true}}};
}
Fields fields_of(torch::optim::RMSpropParamState& state, const torch::optim::RMSpropOptions& options) {
    return {&state.step(),
            {{"square_avg", &state.square_avg(), true},
             {"momentum_buffer", &state.momentum_buffer(), options.momentum() > 0.0},
             {"grad_avg", &state.grad_avg(), options.centered()}}};
}
Fields fields_of(torch::optim::AdagradParamState& state, const torch::optim::AdagradOptions&) {
    return {&state.step(), {{"sum", &state.sum(), true}}};
}

/// A kind of optimizer whose state is known.
struct Kind {
    bool (*made)(const torch::optim::Optimizer& optimizer);
    std::unique_ptr<ParamState> (*new_state)();
    Fields (*fields)(ParamState& state, const Options& options);
};

template <class Optimizer, class State, class Own>
constexpr Kind kind = {
    [](const torch::optim::Optimizer& optimizer) { return dynamic_cast<const Optimizer*>(&optimizer) != nullptr; },
    []() -> std::unique_ptr<ParamState> { return std::make_unique<State>(); },
    [](ParamState& state, const Options& options) {
        return fields_of(dynamic_cast<State&>(state), dynamic_cast<const Own&>(options));
    }};

const Kind& kind_of(const torch::optim::Optimizer& optimizer) {
    namespace of = torch::optim;
    static constexpr std::array kinds{
        kind<of::AdamW, of::AdamWParamState, of::AdamWOptions>, kind<of::Adam, of::AdamParamState, of::AdamOptions>,
        kind<of::SGD, of::SGDParamState, of::SGDOptions>, kind<of::RMSprop, of::RMSpropParamState, of::RMSpropOptions>,
        kind<of::Adagrad, of::AdagradParamState, of::AdagradOptions>};
    for (const Kind& one : kinds) {
        if (one.made(optimizer)) return one;
    }
    throw Error(ErrorKind::usage,
                "the state of this torch optimizer cannot be saved; use Adam, AdamW, SGD, RMSprop or Adagrad, "
                "or an optimizer of this library");
}

// The state of a parameter, as read. Refuses a state that does not match the optimizer and the parameter.
std::unique_ptr<ParamState> read_state(const Kind& kind, const StateReader& reader, const at::Tensor& parameter,
                                       const Options& options, bool with_values) {
    std::unique_ptr<ParamState> state = kind.new_state();
    const Fields fields = kind.fields(*state, options);
    if (fields.step != nullptr) *fields.step = reader.count("step");
    std::size_t known = 0;
    for (const auto& [name, tensor, needed] : fields.tensors) {
        if (!reader.has(name) && !needed) continue;
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
    std::size_t number = 0;
    for (const auto& group : optimizer_.param_groups()) {
        for (const at::Tensor& parameter : group.params()) {
            const StateWriter section = writer.section(std::to_string(number++));
            const auto found = optimizer_.state().find(parameter.unsafeGetTensorImpl());
            if (found == optimizer_.state().end() || !found->second) continue;
            const Fields fields = kind_of(optimizer_).fields(*found->second, group.options());
            if (fields.step != nullptr) section.put("step", *fields.step);
            for (const auto& [name, tensor, needed] : fields.tensors) {
                if (tensor->defined()) section.put(name, *tensor);
            }
        }
    }
}

Commit TorchOptimizer::prepare(const StateReader& reader) {
    const Kind& kind = kind_of(optimizer_);
    struct One {
        at::Tensor parameter;
        StateReader reader;
        const Options* options;
    };
    // Torch creates Adagrad's state at construction, others' in the first step.
    const bool may_be_empty = dynamic_cast<const torch::optim::Adagrad*>(&optimizer_) == nullptr;
    std::vector<One> states;
    std::size_t number = 0, known = 0;
    for (const auto& group : optimizer_.param_groups()) {
        for (const at::Tensor& parameter : group.params()) {
            const StateReader section = reader.section(std::to_string(number++));
            if (!section.exists() && (may_be_empty || !updates(parameter))) continue;
            read_state(kind, section, parameter, group.options(), /*with_values=*/false);
            known += section.tensors().size();
            if (updates(parameter)) states.push_back({parameter, section, &group.options()});
        }
    }
    if (known != reader.tensors().size()) reader.refuse("", "it belongs to the parameters of another torch optimizer");
    return [this, &kind, states = std::move(states)] {
        const at::NoGradGuard no_grad;
        std::remove_reference_t<decltype(optimizer_.state())> restored;
        for (const One& one : states) {
            restored[one.parameter.unsafeGetTensorImpl()] =
                read_state(kind, one.reader, one.parameter, *one.options, /*with_values=*/true);
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

void TorchOptimizer::update_only(const std::vector<at::Tensor>& parameters) {
    require_that(dynamic_cast<const torch::optim::Adagrad*>(&optimizer_) == nullptr,
                 "the state of torch's Adagrad cannot be sharded: it is made at construction");
    restrict_to(parameters);
    for (const at::Tensor& parameter : this->parameters()) {
        if (!updates(parameter)) optimizer_.state().erase(parameter.unsafeGetTensorImpl());
    }
}

bool TorchOptimizer::keeps(std::string_view name) const {
    const std::vector<at::Tensor> all = parameters();
    const std::string_view number = name.substr(0, name.find('/'));
    for (std::size_t i = 0; i < all.size(); ++i) {
        if (number == std::to_string(i)) return updates(all[i]);
    }
    return true;
}

std::vector<at::Tensor> TorchOptimizer::parameters() const {
    std::vector<at::Tensor> result;
    for (const auto& group : optimizer_.param_groups()) {
        result.insert(result.end(), group.params().begin(), group.params().end());
    }
    return result;
}

}  // namespace microbatch
