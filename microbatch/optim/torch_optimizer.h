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

    void step() override { optimizer_.step(); }

    /// The first group's learning rate.
    double learning_rate() const override;

    /// Gives every group `rate` times the ratio it had to the first group when this was made (1 where that was 0, and
    /// for groups added since).
    void set_learning_rate(double rate) override;

    std::vector<at::Tensor> parameters() const override;

private:
    torch::optim::Optimizer& optimizer_;
    std::vector<double> scales_;
};

}  // namespace microbatch
