#pragma once

#include <torch/optim/optimizer.h>

#include "microbatch/optim/optimizer.h"

namespace microbatch {

/// Lets the Accumulator drive any torch::optim optimizer that does not need a closure.
///
/// Ownership: borrows the optimizer, which must outlive this.
/// Threads:   as the optimizer itself.
class TorchOptimizer final : public Optimizer {
public:
    /// Errors: ErrorKind::usage if the optimizer has no parameter group.
    explicit TorchOptimizer(torch::optim::Optimizer& optimizer);

    /// Divides the gradients in place, unless the divisor is 1.
    /// Errors: ErrorKind::does_not_fit if it runs out of memory: torch's optimizers allocate between their updates, so
    ///         some parameters may have been updated and others not.
    void step(std::span<const GradientView> gradients, double divisor) override;
    using Optimizer::step;

    /// During the dry run, the torch optimizer sees the gradients as its parameters, and no state.
    void dry_run(std::span<const GradientView> gradients, double divisor) override;
    using Optimizer::dry_run;
    void end_dry_run() override { dry_run_state_.clear(); }
    bool has_state() const override;

    /// Saves torch's state by parameter number: the step number and the tensors. Does not save the groups' options.
    /// Errors: ErrorKind::usage for optimizers other than Adam, AdamW, SGD, RMSprop and Adagrad: torch exposes their
    ///         state only as pickle archives.
    void save(const StateWriter& writer) const override;
    Commit prepare(const StateReader& reader) override;

    /// The learning rate of the first group.
    double learning_rate() const override;

    /// Sets every group to `rate` times its ratio to the first group at construction (1 if that was 0, and for groups
    /// added later).
    void set_learning_rate(double rate) override;

    std::vector<at::Tensor> parameters() const override;
    void update_only(const std::vector<at::Tensor>& parameters) override;
    bool keeps(std::string_view name) const override;

private:
    torch::optim::Optimizer& optimizer_;
    std::vector<double> scales_;
    std::vector<std::unique_ptr<torch::optim::OptimizerParamState>> dry_run_state_;  // one per parameter, in order
};

}  // namespace microbatch
