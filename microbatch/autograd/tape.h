#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "microbatch/core/keep.h"

namespace microbatch {

struct TapeState;

/// A BatchNorm call in training mode: the layer, and what it is to normalise.
struct BatchNormCall {
    at::Tensor x;
    at::Tensor weight = {};                          ///< undefined without affine parameters
    at::Tensor running_mean = {}, running_var = {};  ///< undefined if the layer keeps none
    double momentum = 0.0;
    double epsilon = 0.0;

    /// True if both calls are of the same layer.
    bool same_layer(const BatchNormCall& other) const;
};

/// What BatchNorm normalises by, in the type of the layer's parameters.
struct BatchStatistics {
    at::Tensor mean, variance;
    double count = 0.0;  ///< values per channel
    double epsilon = 0.0;
};

/// Sums per channel over the values that a BatchNorm normalises: of the gradient that arrives at its input with the
/// statistics held constant, and of that gradient times the normalised input. Undefined: zero.
struct BatchNormSums {
    at::Tensor gradient = {}, product = {};

    void add(const BatchNormSums& other);
};

/// Runs backward from `roots`, with the gradients of each; `again`: the graph is used again later.
using BackwardFunction =
    std::function<void(const std::vector<at::Tensor>& roots, const std::vector<at::Tensor>& gradients, bool again)>;

/// What a tape asks of its surroundings while it records.
struct TapeHooks {
    /// Runs an operator.
    std::function<void(const std::function<void()>&)> execute = {};
    /// Waits for the statistics of the whole batch. They must live as long as the tape.
    std::function<const BatchStatistics&(const BatchNormCall&)> statistics = {};
    /// True for a buffer that counts batches, which no value depends on: in-place changes are not recorded.
    std::function<bool(const at::Tensor&)> is_count = {};
    bool moves_counts = true;  ///< false: and they do not take place
};

/// The operators of one micro-batch's forward, which can run again, piece by piece, with or without a graph. Its
/// BatchNorm calls in training mode cut it into segments: see Program.
///
/// Works for code that was not written for it, in any language, because it records the operators that the code calls;
/// nothing is traced or compiled in advance, and each forward is recorded anew. While an operator is recorded it runs
/// without a graph. A function that brings its own gradient (torch::autograd::Function, a compiled region) is not run
/// again: its graph is kept, and used.
///
/// Formula: BatchNorm with the statistics s held constant has the gradient g with respect to its input; that of the
///          whole batch is g - mean(g) - x̂ mean(g x̂), x̂ the normalised input, the means over the whole batch.
/// Source:  reference: docs/batch-norm.md. Deviation: none.
/// Errors:  ErrorKind::usage, naming the operator, where running it again would give another result: an in-place change
///          of a view, or of a buffer that is used afterwards; BatchNorm inside a function that brings its own gradient.
/// Threads: one at a time.
class Tape {
public:
    /// `devices`: whose generators the forward may use.
    explicit Tape(const std::vector<at::Device>& devices);
    Tape(const Tape&) = delete;
    Tape& operator=(const Tape&) = delete;
    ~Tape();

    /// Runs `forward`, recording the operators of this thread; `keep`, which must live as long as the tape, says which
    /// of their results are kept. The result is what is differentiated; it may be undefined.
    void record(const std::function<at::Tensor()>& forward, TapeHooks hooks, const Keep& keep);

    /// The recorded operators. Requires: record() has returned.
    Program program() const;
    std::uint64_t fingerprint() const;  ///< the program's

    /// The number of its segments, at least 1.
    std::int32_t segments() const;

    /// Adds this gradient to that of the result.
    void add_gradient(const at::Tensor& gradient);

    /// Differentiates a segment: adds the gradients of its parameters to their .grad, and hands those of its inputs to
    /// the segments before it. Each segment once, from the last to the first; before segment j - 1, finish_barrier(j).
    /// Returns the sums of BatchNorm j, with which the segment begins (none for segment 0).
    BatchNormSums differentiate(std::int32_t segment, const BackwardFunction& backward);

    /// Completes the gradient of the input of BatchNorm j, given the sums over the whole batch.
    void finish_barrier(std::int32_t j, const BatchNormSums& whole);

private:
    std::unique_ptr<TapeState> state_;
};

}  // namespace microbatch
