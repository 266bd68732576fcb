#pragma once

#include <vector>

#include "microbatch/model/parameters.h"

namespace microbatch {

/// What steps have made of an optimizer: the state tensors of each of its parameters, in their order. Only an optimizer
/// that was made alike can read it.
using OptimizerState = std::vector<std::vector<at::Tensor>>;

/// What the Accumulator needs of an optimizer. AdamW and Sgd are ours; TorchOptimizer takes any torch::optim one.
///
/// Threads: no two calls at the same time.
class Optimizer {
public:
    Optimizer() = default;
    Optimizer(const Optimizer&) = delete;
    Optimizer& operator=(const Optimizer&) = delete;
    virtual ~Optimizer() = default;

    /// Updates every parameter that has a gradient, by the gradient over `divisor`; the others keep value and state.
    /// The gradients of a batch are sums: its weight is what they are divided by, over the clip coefficient.
    /// State: gradients are not cleared, but may be left divided. If it throws c10::OutOfMemoryError no parameter has
    /// changed, nor any state.
    virtual void step(double divisor) = 0;

    /// By the gradients as they stand.
    void step() { step(1.0); }

    /// Takes a step for its memory and its time alone: parameters and state are not touched. What stands in for them
    /// are the gradients themselves, whose values are lost, and a state that is begun anew and kept until
    /// end_dry_run().
    virtual void dry_run(double divisor) = 0;

    /// Drops the state that dry_run() made.
    virtual void end_dry_run() = 0;

    /// True once steps have made the state of every parameter that requires a gradient.
    virtual bool has_state() const = 0;

    /// The state as it is, empty for a parameter that has none yet: the optimizer's own tensors where it has such,
    /// which the next step changes.
    virtual OptimizerState state() const = 0;

    /// True if state() gives the optimizer's own tensors: writing into them is as good as restore().
    virtual bool owns_state() const { return true; }

    /// Goes back to what state() was, by copies. The learning rate stays.
    /// Errors: ErrorKind::usage if it is not the state of such parameters; nothing has changed then.
    virtual void restore(const OptimizerState& state) = 0;

    /// Throws ErrorKind::usage unless it can be the state of such parameters, told by sizes, layouts and dtypes alone:
    /// the tensors may be without numbers.
    virtual void require_state(const OptimizerState& state) const = 0;

    /// The same with tensors that nobody else holds: they become the optimizer's own where it has such, uncopied.
    virtual void adopt(OptimizerState state) { restore(state); }

    /// The learning rate of the groups whose learning_rate_scale is 1.
    virtual double learning_rate() const = 0;

    /// Sets the learning rate; every group keeps its ratio to the others.
    /// Errors: ErrorKind::usage if the rate is negative or not finite; nothing has changed then.
    virtual void set_learning_rate(double rate) = 0;

    /// Every tensor that step() may change.
    virtual std::vector<at::Tensor> parameters() const = 0;
};

/// Parameters that share their settings.
struct ParameterGroup {
    Parameters parameters;
    double weight_decay = 0.0;         ///< decoupled, per unit of learning rate
    double learning_rate_scale = 1.0;  ///< the group's rate is this times the optimizer's
};

/// Two groups: tensors of two or more dimensions decay, biases and norms (fewer dimensions) do not.
/// Empty groups are left out.
std::vector<ParameterGroup> split_by_decay(const Parameters& parameters, double weight_decay);

/// Throws ErrorKind::usage unless `value` is finite and at least 0: "AdamW: epsilon is -1; it must ...".
void validate_setting(const char* optimizer, const char* name, double value);

}  // namespace microbatch
