#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/function.h>

#include <cstddef>
#include <cstdint>
#include <exception>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "microbatch/autograd/operator_call.h"
#include "microbatch/autograd/tape.h"

namespace microbatch {

using GeneratorStates = std::vector<std::pair<at::Generator, at::Tensor>>;

GeneratorStates states_of(const std::vector<at::Generator>& generators);
void establish(const GeneratorStates& states);

/// Throws: the operator cannot run again with the same result.
[[noreturn]] void refuse_exact(const std::string& name, const char* why);

using WeakTensor = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;

/// A value, or a tensor that the forward did not make: a parameter, a buffer, a part of the batch, a constant.
struct TapeInput {
    std::int32_t value = -1;
    at::Tensor constant = {};
    std::uint32_t version = 0;  // of the constant
    bool written = false;
};

/// What an operator made: see ProgramValue.
struct TapeValue {
    std::int32_t made_by = 0;
    std::optional<WeakTensor> tensor;  // the forward's own: keeps its address from being used again, not its memory
    at::Tensor kept = {};
    bool pinned = false;  // kept because no operator can make it again
    std::int32_t storage = 0;
    std::int64_t bytes = 0;
    bool requires_grad = false;
    bool overwritten = false;
};

/// An operator call, or a function that brings its own gradient.
struct TapeEntry {
    std::optional<c10::OperatorHandle> op;
    Arguments arguments = {};
    OperatorModes modes = {};
    GeneratorStates generators = {};  // before it, if it draws
    std::vector<TapeInput> inputs = {};
    std::vector<std::int32_t> outputs = {};                             // by result tensor; -1 for an undefined one
    std::vector<std::pair<std::int32_t, std::int32_t>> rewritten = {};  // values whose memory it changed: before, after
    bool is_barrier = false;
    // Of a function:
    torch::autograd::Node* node = nullptr;
    std::vector<at::Tensor> roots = {};   // its results
    std::vector<at::Tensor> leaves = {};  // by input: where its backward leaves the gradient

    std::string name() const { return op ? op->schema().name() : "a function with its own gradient"; }
};

/// What a tape has recorded, and what of it is differentiated so far.
struct TapeState {
    std::vector<at::Generator> generators = {};  // torch's default ones
    TapeHooks hooks = {};
    const Keep* keep = nullptr;
    std::vector<TapeEntry> entries = {};
    std::vector<TapeValue> values = {};
    std::vector<std::int32_t> barriers = {};
    std::vector<const BatchStatistics*> statistics = {};  // by barrier
    std::vector<at::Tensor> gradients = {};               // by value
    std::vector<at::Tensor> barrier_gradients = {};       // by barrier: with respect to its input, statistics constant
    std::unordered_map<c10::TensorImpl*, std::int32_t> known = {};
    std::int32_t storages = 0;
    std::uint64_t fingerprint = 0;
    TapeInput result = {};
    bool barrier_without_graph = false;
    std::exception_ptr refusal = {};  // an Error that the recording threw

    void record(const c10::OperatorHandle& op, torch::jit::Stack& stack);
    bool move_count(const c10::OperatorHandle& op, torch::jit::Stack& stack) const;
    bool wait_for_statistics(const c10::OperatorHandle& op, torch::jit::Stack& stack);
    TapeInput input_of(const at::Tensor& tensor, bool written);
    std::int32_t output_of(const at::Tensor& tensor, std::int32_t entry, const TapeEntry& call);
    std::vector<at::Generator> generators_of(const c10::OperatorHandle& op, const torch::jit::Stack& stack) const;
    void pin_if_empty(TapeValue& made, const at::Tensor& tensor);
    void add_function(const at::Tensor& result);
    void before_change(TapeEntry& entry);
    void after_change(TapeEntry& entry, std::int32_t index);
    std::int32_t add_value(const at::Tensor& tensor, std::int32_t made_by, std::int32_t storage, bool requires_grad);
    bool keeps(std::int32_t value) const;

    std::int32_t begin_of(std::int32_t segment) const {
        return segment == 0 ? 0 : barriers[static_cast<std::size_t>(segment - 1)];
    }
    std::int32_t end_of(std::int32_t segment) const {
        const auto next = static_cast<std::size_t>(segment);
        return next < barriers.size() ? barriers[next] : static_cast<std::int32_t>(entries.size());
    }
    TapeValue& value(std::int32_t number) { return values[static_cast<std::size_t>(number)]; }
    TapeEntry& entry(std::int32_t number) { return entries[static_cast<std::size_t>(number)]; }
    at::Tensor& gradient(std::int32_t number) { return gradients[static_cast<std::size_t>(number)]; }
    void add_gradient(std::int32_t number, const at::Tensor& more);
    std::vector<std::int32_t> with_gradient(std::int32_t begin, std::int32_t end);
    void differentiate_piece(std::int32_t begin, std::int32_t end, const BackwardFunction& backward);
    void differentiate_function(TapeEntry& function, const BackwardFunction& backward);
    std::size_t barrier_at(std::int32_t entry) const;
    BatchNormSums sums_of(std::size_t barrier);
    void compute_kept(std::int32_t segment);
    void release(std::int32_t from, bool pinned);
};

}  // namespace microbatch
