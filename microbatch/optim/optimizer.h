#pragma once

#include <span>
#include <vector>

#include "microbatch/model/parameters.h"
#include "microbatch/optim/gradient_view.h"
#include "microbatch/state/stateful.h"

namespace microbatch {

/// What the Accumulator needs of an optimizer. AdamW and Sgd are ours; TorchOptimizer takes any torch::optim one.
///
/// State:   the tensors that steps have made, by parameter; not the learning rate.
/// Threads: no two calls at the same time.
class Optimizer : public Stateful {
public:
    Optimizer() = default;
    Optimizer(const Optimizer&) = delete;
    Optimizer& operator=(const Optimizer&) = delete;

    /// Updates every parameter that has a gradient among these by the gradient over `divisor`; the others keep value
    /// and state. The gradients of a batch are sums: the divisor is its weight over the clip coefficient. Gradients of
    /// parameters of others are ignored.
    /// State: gradients may be left divided. If it throws c10::OutOfMemoryError no parameter has changed, nor any
    /// state.
    virtual void step(std::span<const GradientView> gradients, double divisor) = 0;

    /// The same with what is in .grad, for a loop that calls backward() itself.
    void step(double divisor = 1.0) { step(gradients_in(parameters()), divisor); }

    /// Uses the memory and the time of a step, and leaves parameters and state alone. In their place it changes the
    /// gradients, whose values are lost, and a state of its own that is kept until end_dry_run().
    virtual void dry_run(std::span<const GradientView> gradients, double divisor) = 0;
    void dry_run(double divisor) { dry_run(gradients_in(parameters()), divisor); }

    /// Drops the state that dry_run() made.
    virtual void end_dry_run() = 0;

    /// True once steps have made the state of every parameter that requires a gradient.
    virtual bool has_state() const = 0;

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
