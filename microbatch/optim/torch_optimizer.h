#pragma once

#include <torch/optim/optimizer.h>

#include "microbatch/optim/optimizer.h"

namespace microbatch {

/// Lets the Accumulator drive any torch::optim optimizer that needs no closure.
///
/// Ownership: borrows the optimizer, which must outlive this.
/// Threads:   as the optimizer itself.
class TorchOptimizer final : public Optimizer {
public:
    /// Errors: ErrorKind::usage if the optimizer has no parameter group.
    explicit TorchOptimizer(torch::optim::Optimizer& optimizer);

    /// Errors: ErrorKind::does_not_fit if it runs out of memory: torch's optimizers allocate between their updates, so
    /// that some parameters may have been updated and others not.
    /// It divides the gradients in place, unless the divisor is 1.
    void step(std::span<const GradientView> gradients, double divisor) override;
    using Optimizer::step;

    /// The torch optimizer sees the gradients for its parameters and no state for as long as this lasts.
    void dry_run(std::span<const GradientView> gradients, double divisor) override;
    using Optimizer::dry_run;
    void end_dry_run() override { dry_run_state_.clear(); }
    bool has_state() const override;

    /// By the parameter's number what torch keeps of it: the step's number and its tensors. Not the groups' options.
    /// Errors: ErrorKind::usage for others than Adam, AdamW, SGD, RMSprop and Adagrad: torch tells what those keep only
    ///         in an archive of pickles.
    void save(const StateWriter& writer) const override;
    Commit prepare(const StateReader& reader) override;

    /// The first group's learning rate.
    double learning_rate() const override;

    /// Gives every group `rate` times the ratio it had to the first group when this was made (1 where that was 0, and
    /// for groups added since).
    void set_learning_rate(double rate) override;

    std::vector<at::Tensor> parameters() const override;

private:
    torch::optim::Optimizer& optimizer_;
    std::vector<double> scales_;
    std::vector<std::unique_ptr<torch::optim::OptimizerParamState>> dry_run_state_;  // one for each parameter, in order
};

}  // namespace microbatch
