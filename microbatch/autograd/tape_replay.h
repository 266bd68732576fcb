#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <set>
#include <vector>

#include "microbatch/autograd/tape_state.h"

namespace microbatch {

/// Runs recorded operators again. Used once.
class Replay {
public:
    /// With a graph, or without.
    Replay(TapeState& tape, bool graph) : tape_(tape), graph_(graph), tensors_(tape.values.size()) {}

    /// Plans the operators in [begin, end) that these values depend on; without a graph, up to kept values.
    void plan(const std::vector<std::int32_t>& wanted, std::int32_t begin, std::int32_t end);

    /// Values that the planned operators use and do not make, or that are wanted and not made: give() each.
    const std::vector<std::int32_t>& given() const { return given_; }
    void give(std::int32_t value, at::Tensor tensor);

    /// The input of the BatchNorm that begins the plan, if it is to be differentiated apart from other uses.
    void give_barrier_input(at::Tensor tensor) { barrier_input_ = std::move(tensor); }

    /// Errors: ErrorKind::usage, naming the operator, if the result would not be the same.
    void run();

    /// A value that was wanted, or given. With a graph, only the graph of a wanted value may be used: where the numbers
    /// are not needed to compute others, they may be missing.
    const at::Tensor& operator[](std::int32_t value) const { return tensors_[static_cast<std::size_t>(value)]; }

private:
    bool is_needed(const TapeEntry& entry, const std::vector<bool>& needed) const;
    void run(const TapeEntry& entry);
    std::vector<at::Tensor> inputs_of(const TapeEntry& entry);
    at::Tensor to_use(const TapeEntry& entry, const TapeInput& input);
    bool only_graph_needed(const TapeEntry& entry, const torch::jit::Stack& arguments) const;
    void set(std::int32_t value, const at::Tensor& tensor);
    void release(std::int32_t value);

    TapeState& tape_;
    bool graph_;
    std::vector<at::Tensor> tensors_;  // by value
    std::vector<std::int32_t> uses_;   // by value: still to come
    std::vector<std::int32_t> wanted_, order_, given_;
    std::set<std::int32_t> borrowed_;  // given: not to be changed
    at::Tensor barrier_input_;
};

/// The tape's values, computed again where they are not kept.
std::vector<at::Tensor> values_again(TapeState& tape, const std::vector<std::int32_t>& wanted);

}  // namespace microbatch
