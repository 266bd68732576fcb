#include "microbatch/autograd/sum_in_place.h"

#include <ATen/FuncTorchTLS.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/grad_mode.h>
#include <ATen/functorch/DynamicLayer.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/anomaly_mode.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <mutex>

namespace microbatch {

namespace {

using torch::autograd::Node;

/// The lock under which torch adds to a .grad, which only its own nodes can reach otherwise.
class AccumulationLock : Node {
public:
    static std::unique_lock<std::mutex> of(Node& accumulate) {
        return std::unique_lock(accumulate.*(&AccumulationLock::mutex_));
    }
};

/// True if this backward only adds to .grad.
bool only_accumulates() {
    const auto* chosen = torch::autograd::get_current_graph_task_exec_info();
    return !at::GradMode::is_enabled() && chosen != nullptr && chosen->empty() &&
           !torch::autograd::AnomalyMode::is_enabled();
}

bool can_add_to(const at::Tensor& sum, const at::Tensor& leaf, std::initializer_list<at::Tensor> terms) {
    if (!is_plain(sum) || sum.requires_grad() || sum.sizes() != leaf.sizes() || !sum.is_non_overlapping_and_dense()) {
        return false;
    }
    return std::all_of(terms.begin(), terms.end(), [&](const at::Tensor& term) {
        return term.scalar_type() == sum.scalar_type() && !term.is_alias_of(sum);
    });
}

}  // namespace

bool is_plain(const at::Tensor& tensor) {
    return tensor.defined() && tensor.layout() == at::kStrided && tensor.is_floating_point() &&
           !at::isTensorSubclassLike(tensor) && !tensor._fw_grad(/*level=*/0).defined();
}

bool is_fp32_on_cpu(const at::Tensor& tensor) {
    return is_plain(tensor) && tensor.is_cpu() && tensor.scalar_type() == at::kFloat;
}

bool operators_are_watched() {
    // The state of functorch stays once it was made, as by torch.compile; a transform is active while it has a layer.
    const bool transformed =
        at::functorch::functorchTLSAccessor() != nullptr && !at::functorch::getDynamicLayerStack().empty();
    return transformed || c10::impl::TorchDispatchModeTLS::any_modes_set();
}

bool has_hooks(Node& node) {
    return !node.tensor_pre_hooks().empty() || !node.retains_grad_hooks().empty() || !node.pre_hooks().empty() ||
           !node.post_hooks().empty();
}

bool sum_in_place(const at::Tensor& leaf, std::initializer_list<at::Tensor> terms,
                  c10::function_ref<void(at::Tensor& sum)> add) {
    if (!leaf.defined() || !only_accumulates() || !leaf.is_leaf() || !leaf.requires_grad()) return false;
    const auto accumulate = torch::autograd::impl::try_get_grad_accumulator(leaf);
    if (!accumulate || has_hooks(*accumulate)) return false;
    const auto lock = AccumulationLock::of(*accumulate);
    at::Tensor& sum = leaf.mutable_grad();
    if (!can_add_to(sum, leaf, terms)) return false;
    add(sum);
    return true;
}

}  // namespace microbatch
