#pragma once

#include <optional>
#include <span>
#include <string_view>
#include <unordered_set>
#include <vector>

#include "microbatch/model/parameters.h"
#include "microbatch/optim/gradient_view.h"
#include "microbatch/state/stateful.h"

namespace microbatch {

/// The interface between the Accumulator and an optimizer. AdamW and Sgd are our own; TorchOptimizer adapts any
/// torch::optim optimizer.
///
/// State:   the tensors that steps have created, by parameter; not the learning rate.
/// Threads: no two calls at the same time.
class Optimizer : public Stateful {
public:
    Optimizer() = default;
    Optimizer(const Optimizer&) = delete;
    Optimizer& operator=(const Optimizer&) = delete;

    /// Updates every parameter that has a gradient among these with the gradient / `divisor`; other parameters keep
    /// their value and state. The gradients of a batch are sums: the divisor is its weight over the clip coefficient.
    /// Gradients of unknown parameters are ignored.
    /// State: gradients may be left divided. If it throws c10::OutOfMemoryError, neither parameters nor state have
    ///        changed.
    virtual void step(std::span<const GradientView> gradients, double divisor) = 0;

    /// The same with the .grad tensors, for a loop that calls backward() itself.
    void step(double divisor = 1.0) { step(gradients_in(parameters()), divisor); }

    /// Creates the state that a step with these gradients would create, so that the step does not run out of memory.
    /// Optional. Errors: c10::OutOfMemoryError; nothing has changed then.
    virtual void reserve(std::span<const GradientView>) {}

    /// Uses memory and time like a step, but leaves parameters and state unchanged. Instead it overwrites the
    /// gradients, and uses temporary state that is kept until end_dry_run().
    virtual void dry_run(std::span<const GradientView> gradients, double divisor) = 0;
    void dry_run(double divisor) { dry_run(gradients_in(parameters()), divisor); }

    /// Drops the state that dry_run() created.
    virtual void end_dry_run() = 0;

    /// True when steps have created the state of every parameter that requires a gradient.
    virtual bool has_state() const = 0;

    /// The learning rate of the groups whose learning_rate_scale is 1.
    virtual double learning_rate() const = 0;

    /// Sets the learning rate; every group keeps its ratio to the others.
    /// Errors: ErrorKind::usage if the rate is negative or not finite; nothing has changed then.
    virtual void set_learning_rate(double rate) = 0;

    /// Every tensor that step() may change.
    virtual std::vector<at::Tensor> parameters() const = 0;

    /// From now on updates these tensors alone, and has state for them alone: another process has the others'. What state
    /// there is for others is dropped; prepare() accepts it, and leaves it out.
    /// Errors: ErrorKind::usage if the optimizer does not support it; nothing has changed then.
    virtual void update_only(const std::vector<at::Tensor>& parameters);

    /// Ends update_only(). Errors: ErrorKind::usage if it has state, of which others have the rest.
    void update_all();
    virtual bool is_partial() const { return only_.has_value(); }

    /// False for a state, by its name in save(), of a parameter that update_only() leaves to another process.
    virtual bool keeps(std::string_view /*name*/) const { return true; }

protected:
    /// For update_only() of optimizers that support it.
    void restrict_to(const std::vector<at::Tensor>& parameters);
    virtual void lift_restriction() { only_.reset(); }

    /// False for a tensor that update_only() leaves to another process.
    bool updates(const at::Tensor& parameter) const {
        return !only_ || only_->contains(parameter.unsafeGetTensorImpl());
    }

    /// The gradients of tensors that it updates.
    GradientViews updated(std::span<const GradientView> gradients) const;

private:
    std::optional<std::unordered_set<const void*>> only_;
};

/// Parameters with common settings.
struct ParameterGroup {
    Parameters parameters;
    double weight_decay = 0.0;         ///< decoupled, per unit of learning rate
    double learning_rate_scale = 1.0;  ///< the group's rate is the optimizer's rate times this
};

/// Two groups: tensors with two or more dimensions have weight decay; biases and norms (fewer dimensions) do not. Empty
///             groups are omitted.
std::vector<ParameterGroup> split_by_decay(const Parameters& parameters, double weight_decay);

/// Throws ErrorKind::usage unless `value` is finite and at least 0: "AdamW: epsilon is -1; it must ...".
void validate_setting(const char* optimizer, const char* name, double value);

}  // namespace microbatch
