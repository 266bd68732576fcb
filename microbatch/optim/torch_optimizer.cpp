#include "microbatch/optim/torch_optimizer.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/_foreach_div.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <torch/serialize/archive.h>

#include <algorithm>
#include <cstring>
#include <sstream>
#include <utility>

#include "microbatch/core/error.h"
#include "microbatch/core/text.h"

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
        throw Error(ErrorKind::does_not_fit,
                    text("the torch optimizer ran out of memory between its updates, and some parameters may have been "
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

void TorchOptimizer::rehearse(double divisor) {
    divide_gradients(divisor);
    const StandIns stand_ins(optimizer_, rehearsed_);
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

OptimizerState TorchOptimizer::state() const {
    if (optimizer_.state().empty()) return {};
    torch::serialize::OutputArchive archive;
    optimizer_.save(archive);
    std::ostringstream stream;
    archive.save_to(stream);
    const std::string bytes = std::move(stream).str();
    const at::Tensor tensor = at::empty({static_cast<std::int64_t>(bytes.size())}, at::kByte);
    std::memcpy(tensor.mutable_data_ptr(), bytes.data(), bytes.size());
    return {{tensor}};
}

void TorchOptimizer::require_state(const OptimizerState& state) const {
    const bool sound = state.empty() || (state.size() == 1 && state[0].size() == 1 && state[0][0].dim() == 1 &&
                                         state[0][0].scalar_type() == at::kByte);
    if (!sound) throw Error(ErrorKind::usage, "this is not the state of a torch optimizer");
}

void TorchOptimizer::restore(const OptimizerState& state) {
    const double rate = learning_rate();
    // Loading keeps the state of parameters that have none in the archive.
    auto before = std::exchange(optimizer_.state(), {});
    if (state.empty()) return;
    try {
        const at::Tensor& tensor = state.at(0).at(0);
        torch::serialize::InputArchive archive;
        archive.load_from(static_cast<const char*>(tensor.const_data_ptr()), tensor.nbytes());
        optimizer_.load(archive);
    } catch (const c10::OutOfMemoryError&) {
        optimizer_.state() = std::move(before);
        throw;
    } catch (const std::exception&) {
        optimizer_.state() = std::move(before);
        throw Error(ErrorKind::usage, "this is not the state of such a torch optimizer");
    }
    set_learning_rate(rate);
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
