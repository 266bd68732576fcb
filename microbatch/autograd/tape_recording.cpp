#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/ScopeExit.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

#include <algorithm>
#include <functional>
#include <set>
#include <string>
#include <utility>

#include "microbatch/autograd/tape_state.h"
#include "microbatch/core/error.h"

namespace microbatch {

namespace {

using torch::autograd::AccumulateGrad;
using torch::autograd::Node;
using torch::jit::Stack;

bool draws(const c10::OperatorHandle& op) {
    return op.hasTag(at::Tag::nondeterministic_seeded);
}

// Their results have no gradient, although their inputs may.
bool detaches(const std::string& name) {
    return name == "aten::detach" || name == "aten::detach_";
}

/// The leaves that a graph leads to.
std::vector<at::Tensor> leaves_of(Node* root) {
    std::vector<at::Tensor> leaves;
    std::vector<Node*> open{root};
    std::set<Node*> seen{root};
    while (!open.empty()) {
        Node* node = open.back();
        open.pop_back();
        if (const auto* leaf = dynamic_cast<AccumulateGrad*>(node)) leaves.push_back(leaf->variable);
        for (const auto& edge : node->next_edges()) {
            if (edge.is_valid() && seen.insert(edge.function.get()).second) open.push_back(edge.function.get());
        }
    }
    return leaves;
}

TapeState*& recording() {
    static thread_local TapeState* state = nullptr;
    return state;
}

/// The function with its own gradient that returned the tensor, or nullptr. Does not ask torch, which would make a new
/// node for a view that was changed.
Node* node_of(const at::Tensor& tensor) {
    const auto* meta = torch::autograd::impl::get_autograd_meta(tensor);
    return meta == nullptr ? nullptr : meta->grad_fn_.get();
}

/// Torch takes a view that changed while nothing had a graph for a mistake; there is no graph that could be wrong.
void mark_as_seen(const at::Tensor& tensor) {
    auto* meta = torch::autograd::impl::get_view_autograd_meta(tensor);
    if (meta != nullptr && meta->has_bw_view()) meta->set_attr_version(static_cast<std::uint32_t>(tensor._version()));
}

void on_operator(const c10::OperatorHandle& op, Stack* stack) {
    const c10::impl::ExcludeDispatchKeyGuard once(c10::DispatchKey::TESTING_ONLY_GenericMode);
    TapeState* state = recording();
    if (state == nullptr) return op.callBoxed(stack);
    try {
        state->record(op, *stack);
    } catch (const Error&) {
        state->refusal = std::current_exception();
        throw;
    }
}

// Not before somebody needs it, and for good, because threads may record at the same time.
void watch_operators() {
    [[maybe_unused]] static const auto* const library = [] {
        auto* made = new torch::Library(torch::Library::IMPL, "_", c10::DispatchKey::TESTING_ONLY_GenericMode, __FILE__,
                                        __LINE__);
        made->fallback(torch::CppFunction::makeFromBoxedFunction<&on_operator>());
        return made;
    }();
}

// What torch's batch_norm calls. A model that calls it by itself cannot wait for the batch.
bool is_batch_norm_kernel(const std::string& name) {
    static const std::set<std::string, std::less<>> kernels{"aten::native_batch_norm", "aten::cudnn_batch_norm",
                                                            "aten::miopen_batch_norm", "aten::_native_batch_norm_legit",
                                                            "aten::_batch_norm_with_update"};
    return kernels.contains(name);
}

// Whether a call of such a kernel normalises by the batch.
bool trains(const c10::OperatorHandle& op, const Stack& stack) {
    const auto& arguments = op.schema().arguments();
    for (std::size_t i = 0; i < arguments.size(); ++i) {
        if (arguments[i].name() == "training") return torch::jit::peek(stack, i, arguments.size()).toBool();
    }
    return true;
}

}  // namespace

// True if it changes a count of batches; it has then run, if it is to.
bool TapeState::move_count(const c10::OperatorHandle& op, Stack& stack) const {
    const auto& arguments = op.schema().arguments();
    if (arguments.empty() || op.schema().returns().size() != 1) return false;
    const auto* alias = arguments[0].alias_info();
    const at::IValue first = torch::jit::peek(stack, 0, arguments.size());
    if (alias == nullptr || !alias->isWrite() || !first.isTensor() || !hooks.is_count(first.toTensor())) return false;
    if (hooks.moves_counts) {
        const OperatorModes modes;
        hooks.execute([&] { modes.call(op, stack, /*graph=*/false); });
    } else {
        torch::jit::drop(stack, arguments.size());
        stack.push_back(first);
    }
    return true;
}

// True if it is a BatchNorm in training mode; its arguments are then those of one with the batch's statistics.
bool TapeState::wait_for_statistics(const c10::OperatorHandle& op, Stack& stack) {
    const std::string& name = op.schema().name();
    if (is_batch_norm_kernel(name) && trains(op, stack)) {
        refuse_exact(name, "is called directly: only torch's batch_norm can wait for the batch");
    }
    if (name != "aten::batch_norm") return false;
    // input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled
    const auto argument = [&](std::size_t i) -> at::IValue& { return torch::jit::peek(stack, i, 9); };
    if (!argument(5).toBool()) return false;
    if (!at::GradMode::is_enabled()) barrier_without_graph = true;
    const auto tensor = [&](std::size_t i) { return argument(i).isTensor() ? argument(i).toTensor() : at::Tensor(); };
    const BatchNormCall call{.x = tensor(0),
                             .weight = tensor(1),
                             .running_mean = tensor(3),
                             .running_var = tensor(4),
                             .momentum = argument(6).toDouble(),
                             .epsilon = argument(7).toDouble()};
    const BatchStatistics& batch = hooks.statistics(call);
    statistics.push_back(&batch);
    argument(3) = batch.mean;
    argument(4) = batch.variance;
    argument(5) = false;
    return true;
}

void TapeState::record(const c10::OperatorHandle& op, Stack& stack) {
    if (move_count(op, stack)) return;
    const bool is_barrier = wait_for_statistics(op, stack);
    TapeEntry entry{.op = op};
    entry.is_barrier = is_barrier;
    entry.arguments = Arguments(
        op, stack, [&](const at::Tensor& tensor, bool written) { entry.inputs.push_back(input_of(tensor, written)); });
    if (draws(op)) entry.generators = states_of(generators_of(op, stack));
    before_change(entry);
    hooks.execute([&] { entry.modes.call(op, stack, /*graph=*/false); });

    const auto index = static_cast<std::int32_t>(entries.size());
    const std::size_t returned = op.schema().returns().size();
    const Stack results(stack.end() - static_cast<std::ptrdiff_t>(returned), stack.end());
    for (const at::Tensor& tensor : result_tensors(results)) entry.outputs.push_back(output_of(tensor, index, entry));
    after_change(entry, index);
    const bool matters = !entry.outputs.empty() || !entry.rewritten.empty();
    if (!matters) return;
    fingerprint = fingerprint * 1099511628211ULL + std::hash<std::string>()(op.schema().name()) + entry.inputs.size();
    if (is_barrier) barriers.push_back(index);
    entries.push_back(std::move(entry));
}

// Torch's own, and those that it is called with.
std::vector<at::Generator> TapeState::generators_of(const c10::OperatorHandle& op, const Stack& stack) const {
    std::vector<at::Generator> all = generators;
    for (const at::IValue& argument : torch::jit::last(stack, op.schema().arguments().size())) {
        if (argument.isGenerator()) all.push_back(argument.toGenerator());
    }
    return all;
}

TapeInput TapeState::input_of(const at::Tensor& tensor, bool written) {
    if (!tensor.defined()) return {};
    if (node_of(tensor) != nullptr) add_function(tensor);
    const auto found = known.find(tensor.unsafeGetTensorImpl());
    if (found != known.end()) {
        if (!written) pin_if_empty(value(found->second), tensor);
        return {.value = found->second, .written = written};
    }
    return {.constant = tensor,
            .version = tensor.is_inference() ? 0 : static_cast<std::uint32_t>(tensor._version()),
            .written = written};
}

// Uninitialised memory that no operator wrote to before it is read was filled behind their backs, as at::tensor() does.
void TapeState::pin_if_empty(TapeValue& made, const at::Tensor& tensor) {
    const TapeEntry& by = entry(made.made_by);
    if (!by.op || made.pinned) return;
    const std::string& name = by.op->schema().name();
    if (!name.starts_with("aten::empty") && !name.starts_with("aten::new_empty")) return;
    made.kept = tensor.detach();
    made.pinned = true;
}

// The first use of what a function with its own gradient returned: everything else runs without a graph.
void TapeState::add_function(const at::Tensor& result) {
    const auto known_as = known.find(result.unsafeGetTensorImpl());
    Node* node = node_of(result);
    const auto of_node = [node](const TapeEntry& one) { return one.node == node; };
    const auto found = std::find_if(entries.begin(), entries.end(), of_node);
    if (found != entries.end() && known_as != known.end()) {
        const auto made = value(known_as->second).made_by;
        if (made >= static_cast<std::int32_t>(found - entries.begin())) return;  // known, perhaps changed since
    }
    if (barrier_without_graph) {
        refuse_exact("a function with its own gradient",
                     "contains a BatchNorm (turn activation checkpointing off, or torch.compile)");
    }
    std::int32_t index = static_cast<std::int32_t>(found - entries.begin());
    if (found == entries.end()) {
        TapeEntry function{.op = std::nullopt};
        function.node = node;
        for (const at::Tensor& leaf : leaves_of(node)) {
            const auto value_of_leaf = known.find(leaf.unsafeGetTensorImpl());
            if (value_of_leaf == known.end()) continue;
            function.inputs.push_back({.value = value_of_leaf->second});
            function.leaves.push_back(leaf);
        }
        fingerprint = fingerprint * 1099511628211ULL + function.inputs.size();
        entries.push_back(std::move(function));
    }
    const std::int32_t made = add_value(result, index, storages++, /*requires_grad=*/true);
    value(made).kept = result.detach();
    value(made).pinned = true;
    entry(index).outputs.push_back(made);
    entry(index).roots.push_back(result);
}

std::int32_t TapeState::add_value(const at::Tensor& tensor, std::int32_t made_by, std::int32_t storage,
                                  bool requires_grad) {
    const auto number = static_cast<std::int32_t>(values.size());
    values.push_back({.made_by = made_by,
                      .tensor = WeakTensor(tensor.getIntrusivePtr()),
                      .storage = storage,
                      .bytes = static_cast<std::int64_t>(tensor.nbytes()),
                      .requires_grad = requires_grad});
    known[tensor.unsafeGetTensorImpl()] = number;
    if (keeps(number)) values.back().kept = tensor.detach();
    return number;
}

bool TapeState::keeps(std::int32_t number) const {
    const auto place = static_cast<std::size_t>(number);
    return place < keep->forward.size() && keep->forward[place];
}

std::int32_t TapeState::output_of(const at::Tensor& tensor, std::int32_t index, const TapeEntry& call) {
    if (!tensor.defined()) return -1;
    // What is changed without a graph keeps the gradient that it had.
    const auto needs = [&](const TapeInput& input) {
        const bool requires_grad = input.value >= 0 ? values[static_cast<std::size_t>(input.value)].requires_grad
                                                    : input.constant.defined() && input.constant.requires_grad();
        return requires_grad && (call.modes.grad() || input.written);
    };
    const bool differentiable = (tensor.is_floating_point() || tensor.is_complex()) &&
                                !detaches(call.op->schema().name()) &&
                                std::any_of(call.inputs.begin(), call.inputs.end(), needs);
    // The code sees what it would see without a tape; and a function with its own gradient finds a leaf here.
    // A view needs the flag of its own, although it reports that of its base.
    if (differentiable) tensor.set_requires_grad(true);
    std::int32_t storage = -1;
    for (const TapeInput& input : call.inputs) {
        if (input.value < 0) continue;
        const TapeValue& source = values[static_cast<std::size_t>(input.value)];
        const auto live = source.tensor->lock();
        if (live && live->has_storage() && tensor.has_storage() &&
            live->unsafe_storage().unsafeGetStorageImpl() == tensor.storage().unsafeGetStorageImpl()) {
            storage = source.storage;
        }
    }
    return add_value(tensor, index, storage >= 0 ? storage : storages++, differentiable);
}

// A kept value that is about to be overwritten is copied.
void TapeState::before_change(TapeEntry& call) {
    std::set<std::int32_t> changed;
    for (const TapeInput& input : call.inputs) {
        if (input.written && input.value >= 0) changed.insert(value(input.value).storage);
    }
    if (changed.empty()) return;
    for (std::size_t i = 0; i < values.size(); ++i) {
        TapeValue& one = values[i];
        if (!changed.contains(one.storage)) continue;
        const auto live = one.tensor->lock();
        const bool current = live && known[live.get()] == static_cast<std::int32_t>(i);
        if (!current) continue;
        one.overwritten = true;
        if (one.kept.defined()) one.kept = one.kept.clone();
        call.rewritten.emplace_back(static_cast<std::int32_t>(i), -1);
    }
}

// Every tensor on the changed memory has a new value.
void TapeState::after_change(TapeEntry& call, std::int32_t index) {
    const auto carries_gradient = [this](std::int32_t output) { return output >= 0 && value(output).requires_grad; };
    const bool carries = std::any_of(call.outputs.begin(), call.outputs.end(), carries_gradient);
    for (const std::int32_t output : call.outputs) {
        if (output < 0) continue;
        if (const auto live = value(output).tensor->lock()) mark_as_seen(at::Tensor::wrap_tensor_impl(live));
    }
    std::erase_if(call.rewritten, [&](auto& pair) {
        const auto live = value(pair.first).tensor->lock();
        if (!live) return true;
        if (known[live.get()] != pair.first) return true;  // it is a result
        const at::Tensor tensor = at::Tensor::wrap_tensor_impl(live);
        mark_as_seen(tensor);
        const bool requires_grad = value(pair.first).requires_grad || carries;
        if (requires_grad && node_of(tensor) == nullptr) tensor.set_requires_grad(true);
        pair.second = add_value(tensor, index, value(pair.first).storage, requires_grad);
        return false;
    });
}

void Tape::record(const std::function<at::Tensor()>& forward, TapeHooks hooks, const Keep& keep) {
    watch_operators();
    state_->hooks = std::move(hooks);
    state_->keep = &keep;
    const auto end = c10::make_scope_exit([this] {
        recording() = nullptr;
        state_->hooks = {};
    });
    recording() = state_.get();
    const c10::impl::IncludeDispatchKeyGuard include(c10::DispatchKey::TESTING_ONLY_GenericMode);
    at::Tensor result;
    try {
        result = forward();
    } catch (...) {
        // On its way through another language, an Error of ours became an exception of that language.
        if (state_->refusal) std::rethrow_exception(state_->refusal);
        throw;
    }
    if (result.defined()) state_->result = state_->input_of(result, /*written=*/false);
    state_->known.clear();
    for (TapeValue& value : state_->values) value.tensor.reset();
    state_->gradients.resize(state_->values.size());
    state_->barrier_gradients.resize(state_->barriers.size());
}

}  // namespace microbatch
