#include "microbatch/step/repeatable.h"

#include <ATen/record_function.h>
#include <c10/util/ScopeExit.h>

#include <string>
#include <utility>
#include <vector>

#include "microbatch/core/crc32c.h"
#include "microbatch/core/error.h"
#include "microbatch/model/forward_state.h"

namespace microbatch {
namespace {

std::uint32_t checksum(const at::Tensor& tensor, std::uint32_t before = 0) {
    if (!tensor.defined() || tensor.layout() != at::kStrided || tensor.is_meta()) return before;
    const at::Tensor flat = tensor.detach().cpu().contiguous();
    return crc32c({static_cast<const char*>(flat.const_data_ptr()), flat.nbytes()}, before);
}

std::uint32_t checksum(const NamedTensors& tensors) {
    std::uint32_t sum = 0;
    for (const NamedTensor& one : tensors) sum = checksum(one.tensor, sum);
    return sum;
}

std::uint32_t checksum(const c10::IValue& value, std::uint32_t before) {
    const auto of_bytes = [before](const auto& number) {
        return crc32c({reinterpret_cast<const char*>(&number), sizeof(number)}, before);
    };
    if (value.isTensor()) return checksum(value.toTensor(), before);
    if (value.isDouble()) return of_bytes(value.toDouble());
    if (value.isInt()) return of_bytes(value.toInt());
    if (!value.isTensorList()) return before;
    for (const at::Tensor& one : value.toTensorVector()) before = checksum(one, before);
    return before;
}

/// An operator that ran.
struct Call {
    std::string name;
    std::uint32_t inputs = 0, outputs = 0;
};

/// Where the operators of this thread are recorded.
thread_local std::vector<Call>* calls_of_thread = nullptr;

struct Inputs final : at::ObserverContext {
    explicit Inputs(std::uint32_t sum) : checksum(sum) {}
    std::uint32_t checksum;
};

std::unique_ptr<at::ObserverContext> begin_call(const at::RecordFunction& function) {
    const at::RecordFunctionGuard unobserved(/*is_enabled=*/false);
    std::uint32_t sum = 0;
    for (const c10::IValue& one : function.inputs()) sum = checksum(one, sum);
    return std::make_unique<Inputs>(sum);
}

void end_call(const at::RecordFunction& function, at::ObserverContext* context) {
    const at::RecordFunctionGuard unobserved(/*is_enabled=*/false);
    std::uint32_t sum = 0;
    for (const c10::IValue& one : function.outputs()) sum = checksum(one, sum);
    if (calls_of_thread == nullptr) return;
    calls_of_thread->push_back({function.name(), static_cast<Inputs*>(context)->checksum, sum});
}

/// Runs the grain again and again from the same state.
class Runs {
public:
    Runs(Model& model, const Parameters& parameters, const LossFunction& loss, const std::function<Batch()>& grain)
        : model_(model), parameters_(parameters), loss_(loss), grain_(grain) {}

    /// The checksums of the gradients.
    std::vector<std::uint32_t> gradients() {
        const ForwardStateScope before(model_);
        const auto clear = c10::make_scope_exit([this] {
            for (const Parameter& one : parameters_) one.tensor.mutable_grad() = at::Tensor();
        });
        const std::uint32_t generators = checksum(model_.generator_states());
        const WeightedLoss loss = loss_of(loss_, grain_());
        require_that(
            checksum(model_.generator_states()) == generators,
            "the invariant mode is for models that draw from torch's default generators, and this one draws from "
            "others: random numbers of each grain have to be its own");
        if (loss.sum.defined() && loss.sum.requires_grad()) model_.backward(loss.sum);
        std::vector<std::uint32_t> sums;
        for (const Parameter& one : parameters_) sums.push_back(checksum(one.tensor.grad()));
        return sums;
    }

    std::vector<Call> calls() {
        std::vector<Call> calls;
        calls_of_thread = &calls;
        const auto handle = at::addThreadLocalCallback(at::RecordFunctionCallback(begin_call, end_call)
                                                           .needsInputs(true)
                                                           .needsOutputs(true)
                                                           .scopes({at::RecordScope::FUNCTION}));
        const auto end = c10::make_scope_exit([handle] {
            at::removeCallback(handle);
            calls_of_thread = nullptr;
        });
        gradients();
        return calls;
    }

private:
    Model& model_;
    const Parameters& parameters_;
    const LossFunction& loss_;
    const std::function<Batch()>& grain_;
};

// The first that makes other numbers of the same; what only makes room is not one.
std::string first_that_differs(const std::vector<Call>& one, const std::vector<Call>& other) {
    for (std::size_t i = 0; i < std::min(one.size(), other.size()); ++i) {
        if (one[i].name != other[i].name) return {};
        const bool makes_room =
            one[i].name.find("empty") != std::string::npos || one[i].name.find("resize") != std::string::npos;
        if (!makes_room && one[i].inputs == other[i].inputs && one[i].outputs != other[i].outputs) return one[i].name;
    }
    return {};
}

}  // namespace

void require_repeatable(Model& model, const Parameters& parameters, const LossFunction& loss,
                        const std::function<Batch()>& grain) {
    Runs runs(model, parameters, loss, grain);
    const std::vector<std::uint32_t> first = runs.gradients(), second = runs.gradients();
    if (first == second) return;
    constexpr int times = 3;  // a difference may be rare
    for (int i = 0; i < times; ++i) {
        const std::vector<Call> one = runs.calls(), other = runs.calls();
        const std::string name = first_that_differs(one, other);
        require_that(name.empty(), "the invariant mode cannot have the operator ", name,
                     ": it gives other bits each time on this processor");
    }
    for (std::size_t i = 0; i < first.size(); ++i) {
        require_that(first[i] == second[i], "the invariant mode cannot have this model: the gradient of ",
                     parameters[i].name, " has other bits each time on this processor");
    }
}

}  // namespace microbatch
