#include "microbatch/autograd/operator_call.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/ScopeExit.h>

namespace microbatch {
namespace {

constexpr auto recording_key = c10::DispatchKey::TESTING_ONLY_GenericMode;

bool is_list_of_optionals(const at::IValue& value) {
    if (!value.isList()) return false;
    const auto type = value.toListRef().empty() ? nullptr : value.toList().elementType();
    return type && type->isSubtypeOf(*c10::OptionalType::ofTensor());
}

}  // namespace

OperatorModes::OperatorModes() : keys_(c10::impl::tls_local_dispatch_key_set()), grad_(at::GradMode::is_enabled()) {
    keys_.included_ = keys_.included_.remove(recording_key);
}

bool OperatorModes::autocasts() const {
    return !keys_.excluded_.has_all(c10::autocast_dispatch_keyset);
}

void OperatorModes::call(const c10::OperatorHandle& op, torch::jit::Stack& stack, bool graph) const {
    const c10::impl::ForceDispatchKeyGuard keys(keys_);
    const at::AutoGradMode grad(graph && grad_);
    const AutocastTypes before;
    const bool cache = at::autocast::is_autocast_cache_enabled();
    const auto put_back = c10::make_scope_exit([&] {
        before.establish();
        at::autocast::set_autocast_cache_enabled(cache);
    });
    autocast_.establish();
    // A cached weight would have the graph, or the lack of one, of another call.
    at::autocast::set_autocast_cache_enabled(false);
    op.callBoxed(&stack);
}

Arguments::Arguments(const c10::OperatorHandle& op, const torch::jit::Stack& stack,
                     const std::function<void(const at::Tensor&, bool written)>& each) {
    const auto& schema = op.schema().arguments();
    const std::size_t first = stack.size() - schema.size();
    for (std::size_t i = 0; i < schema.size(); ++i) {
        const at::IValue& value = stack[first + i];
        const bool written = schema[i].alias_info() != nullptr && schema[i].alias_info()->isWrite();
        One one;
        if (value.isTensor()) {
            one.kind = One::Kind::tensor;
            each(value.toTensor(), written);
        } else if (value.isTensorList()) {
            one.kind = One::Kind::list;
            for (const at::Tensor& tensor : value.toTensorVector()) {
                one.present.push_back(true);
                each(tensor, written);
            }
        } else if (is_list_of_optionals(value)) {
            one.kind = One::Kind::optional_list;
            for (const at::IValue& element : value.toListRef()) {
                one.present.push_back(element.isTensor());
                if (element.isTensor()) each(element.toTensor(), written);
            }
        } else {
            one.value = value;
        }
        all_.push_back(std::move(one));
    }
}

torch::jit::Stack Arguments::with(const std::vector<at::Tensor>& tensors) const {
    torch::jit::Stack stack;
    auto next = tensors.begin();
    for (const One& one : all_) {
        switch (one.kind) {
            case One::Kind::plain:
                stack.push_back(one.value);
                break;
            case One::Kind::tensor:
                stack.emplace_back(*next++);
                break;
            case One::Kind::list: {
                c10::List<at::Tensor> list;
                for (std::size_t i = 0; i < one.present.size(); ++i) list.push_back(*next++);
                stack.emplace_back(std::move(list));
                break;
            }
            case One::Kind::optional_list: {
                c10::List<std::optional<at::Tensor>> list;
                for (const bool present : one.present) {
                    list.push_back(present ? std::optional(*next++) : std::nullopt);
                }
                stack.emplace_back(std::move(list));
                break;
            }
        }
    }
    return stack;
}

std::vector<at::Tensor> result_tensors(const torch::jit::Stack& stack) {
    std::vector<at::Tensor> tensors;
    for (const at::IValue& value : stack) {
        if (value.isTensor()) {
            tensors.push_back(value.toTensor());
        } else if (value.isTensorList()) {
            for (const at::Tensor& tensor : value.toTensorVector()) tensors.push_back(tensor);
        }
    }
    return tensors;
}

}  // namespace microbatch
