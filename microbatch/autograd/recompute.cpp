#include "microbatch/autograd/recompute.h"

#include <ATen/autocast_mode.h>
#include <ATen/ops/equal.h>
#include <c10/util/ScopeExit.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/nn/module.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "microbatch/autograd/buffers.h"
#include "microbatch/core/error.h"
#include "microbatch/runtime/generators.h"

namespace microbatch {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;
using torch::nn::Module;
using Block = std::function<at::Tensor(const at::Tensor&)>;

/// What a block's result depends on besides tensors, captured on construction.
class Surroundings {
public:
    Surroundings(at::Device device, const Module& module)
        : device_(device.type()), autocast_(at::autocast::is_autocast_available(device_)) {
        generators_.emplace_back(at::kCPU, generator_state(at::kCPU));
        if (device_ != at::kCPU) generators_.emplace_back(device, generator_state(device));
        if (autocast_) {
            autocast_enabled_ = at::autocast::is_autocast_enabled(device_);
            autocast_type_ = at::autocast::get_autocast_dtype(device_);
        }
        for (const auto& part : module.modules()) training_.emplace_back(part, part->is_training());
    }

    void establish() const {
        for (const auto& [device, state] : generators_) set_generator_state(device, state);
        if (autocast_) {
            at::autocast::set_autocast_enabled(device_, autocast_enabled_);
            at::autocast::set_autocast_dtype(device_, autocast_type_);
        }
        const auto changed = [](const auto& part) { return part.first->is_training() != part.second; };
        if (std::none_of(training_.begin(), training_.end(), changed)) return;
        // Parents come first: train() also sets the children, which then get their own flags.
        for (const auto& [part, training] : training_) part->train(training);
    }

private:
    std::vector<std::pair<at::Device, at::Tensor>> generators_;
    at::DeviceType device_;
    bool autocast_;
    bool autocast_enabled_ = false;
    at::ScalarType autocast_type_ = at::kFloat;
    std::vector<std::pair<std::shared_ptr<Module>, bool>> training_;
};

struct BufferValue {
    at::Tensor buffer;
    at::Tensor value;
};
using BufferValues = std::vector<BufferValue>;

BufferValues copies_of(const std::vector<at::Tensor>& buffers) {
    BufferValues copies;
    for (const at::Tensor& buffer : buffers) copies.push_back({buffer, buffer.detach().clone()});
    return copies;
}

void write(const BufferValues& values) {
    for (const auto& [buffer, value] : values) overwrite_buffer(buffer, value);
}

/// Marks the input: backward stores the gradient that arrives at the mark in `arrived`, unchanged. A leaf would copy it
/// into its own layout, and a different layout may be summed in a different order later.
struct Arrived : torch::CustomClassHolder {
    at::Tensor gradient;
};

class Mark : public Function<Mark> {
public:
    static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const c10::intrusive_ptr<Arrived>& to) {
        context->saved_data["arrived"] = at::IValue::make_capsule(to);
        return x;
    }
    static variable_list backward(AutogradContext* context, variable_list gradients) {
        const auto arrived = c10::static_intrusive_pointer_cast<Arrived>(context->saved_data["arrived"].toCapsule());
        arrived->gradient = std::move(gradients[0]);
        return {at::Tensor(), at::Tensor()};
    }
};

/// What the second run needs from the first.
struct FirstRun : torch::CustomClassHolder {
    FirstRun(Block run, std::shared_ptr<Module> of, at::Device device)
        : block(std::move(run)), module(std::move(of)), surroundings(device, *module) {}

    Block block;
    std::shared_ptr<Module> module;
    Surroundings surroundings;
    BufferValues buffers;  // from before it, for the buffers that it changed
};

/// True if a nested backward computes the same gradient for this parameter as the outer one. Hooks would run in both.
bool only_accumulates(const at::Tensor& parameter) {
    if (!parameter.is_leaf() || !torch::autograd::impl::hooks(parameter).empty()) return false;
    const auto accumulator = torch::autograd::impl::try_get_grad_accumulator(parameter);
    return !accumulator || (accumulator->pre_hooks().empty() && accumulator->post_hooks().empty());
}

/// Disables autocast's cache of converted weights until the result is destroyed: those of the first run have no graph,
/// and those of the second would outlive it.
auto without_autocast_cache() {
    const bool before = at::autocast::is_autocast_cache_enabled();
    at::autocast::set_autocast_cache_enabled(false);
    return c10::make_scope_exit([before] { at::autocast::set_autocast_cache_enabled(before); });
}

at::Tensor run_again(const FirstRun& first, const at::Tensor& x) {
    const Surroundings now(x.device(), *first.module);
    const auto put_back = c10::make_scope_exit([&] { now.establish(); });
    first.surroundings.establish();
    const auto no_cache = without_autocast_cache();
    const at::AutoGradMode grad(true);
    return first.block(x);
}

class Recompute : public Function<Recompute> {
public:
    static at::Tensor forward(AutogradContext* context, const at::Tensor& x, at::TensorList parameters,
                              const Block& block, const std::shared_ptr<Module>& module) {
        const auto first = c10::make_intrusive<FirstRun>(block, module, x.device());
        BufferValues buffers = copies_of(module->buffers());
        const auto no_cache = without_autocast_cache();
        at::Tensor y = block(x);
        for (BufferValue& value : buffers) {
            if (!at::equal(value.buffer, value.value)) first->buffers.push_back(std::move(value));
        }
        variable_list saved = {x};
        saved.insert(saved.end(), parameters.begin(), parameters.end());  // to check their versions: nothing is copied
        context->save_for_backward(std::move(saved));
        context->saved_data["first"] = at::IValue::make_capsule(first);
        context->set_materialize_grads(false);
        return y;
    }

    static variable_list backward(AutogradContext* context, variable_list gradients) {
        require_that(!at::GradMode::is_enabled(),
                     "recompute: a recomputed block does not support gradients of gradients (create_graph); "
                     "turn recompute off");
        const variable_list saved = context->get_saved_variables();
        const std::size_t inputs = saved.size();
        variable_list results(inputs + 2);  // block and module have no gradient
        if (!gradients[0].defined()) return results;
        const auto first = c10::static_intrusive_pointer_cast<FirstRun>(context->saved_data["first"].toCapsule());

        const auto arrived = c10::make_intrusive<Arrived>();
        variable_list sources = saved;
        sources[0] = saved[0].detach();
        if (context->needs_input_grad(0)) sources[0] = mark(sources[0], arrived);
        std::vector<at::Tensor> changed;
        for (const BufferValue& value : first->buffers) changed.push_back(value.buffer);
        const BufferValues now = copies_of(changed);
        const auto put_back = c10::make_scope_exit([&] { write(now); });
        write(first->buffers);
        const at::Tensor y = run_again(*first, sources[0]);
        if (!y.requires_grad()) return results;

        const bool chosen_inputs = !torch::autograd::get_current_graph_task_exec_info()->empty();
        if (!chosen_inputs && std::all_of(saved.begin() + 1, saved.end(), only_accumulates)) {
            torch::autograd::backward({y}, {gradients[0]});
            results[0] = std::move(arrived->gradient);
        } else {
            differentiate(*context, y, gradients[0], sources, results);
        }
        return results;
    }

private:
    static at::Tensor mark(const at::Tensor& x, const c10::intrusive_ptr<Arrived>& arrived) {
        const at::AutoGradMode grad(true);
        return Mark::apply(at::Tensor(x).requires_grad_(), arrived);
    }

    static void differentiate(const AutogradContext& context, const at::Tensor& y, const at::Tensor& gradient,
                              const variable_list& sources, variable_list& results) {
        variable_list needed;
        std::vector<std::size_t> places;
        for (std::size_t i = 0; i < sources.size(); ++i) {
            if (!context.needs_input_grad(i)) continue;
            needed.push_back(sources[i]);
            places.push_back(i);
        }
        std::vector<std::vector<std::unique_ptr<torch::autograd::FunctionPreHook>>> hooks(needed.size());
        const auto exchange = [&] {
            for (std::size_t i = 0; i < needed.size(); ++i) hooks[i].swap(torch::autograd::impl::hooks(needed[i]));
        };
        exchange();  // the outer backward calls them
        const auto put_back = c10::make_scope_exit(exchange);
        variable_list found = torch::autograd::grad({y}, needed, {gradient}, /*retain_graph=*/false,
                                                    /*create_graph=*/false, /*allow_unused=*/true);
        for (std::size_t i = 0; i < places.size(); ++i) results[places[i]] = std::move(found[i]);
    }
};

/// The tensors that require grad, without repeats: a parameter may be registered under several names.
std::vector<at::Tensor> trained_parameters(const Module& module) {
    std::vector<at::Tensor> trained;
    for (const at::Tensor& parameter : module.parameters()) {
        const auto same = [&](const at::Tensor& other) { return other.is_same(parameter); };
        if (parameter.requires_grad() && std::none_of(trained.begin(), trained.end(), same)) {
            trained.push_back(parameter);
        }
    }
    return trained;
}

}  // namespace

at::Tensor recompute(const Block& block, const at::Tensor& x, const std::shared_ptr<Module>& module) {
    if (!at::GradMode::is_enabled()) return block(x);
    const std::vector<at::Tensor> parameters = trained_parameters(*module);
    if (parameters.empty() && !x.requires_grad()) return block(x);
    return Recompute::apply(x, at::TensorList(parameters), block, module);
}

}  // namespace microbatch
