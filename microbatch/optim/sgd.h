#pragma once

#include "microbatch/optim/fused_optimizer.h"

namespace microbatch {

struct SgdOptions {
    double learning_rate = 1e-2;
    double momentum = 0.0;
    bool nesterov = false;
    bool decoupled_weight_decay = true;  ///< false: the decay is added to the gradient, as in torch::optim::SGD
};

/// Stochastic gradient descent with momentum, in one pass, including the division of the gradient.
///
/// Formula:  theta -= eta lambda theta (decoupled);  v = mu v + g;  theta -= eta v, or eta (g + mu v) with Nesterov.
/// Source:   Sutskever et al. 2013, in torch::optim::SGD's form; Loshchilov and Hutter 2019, arXiv:1711.05101 (SGDW).
/// State:    with momentum, one buffer per parameter, created with its first gradient. Memory: 1 x parameter.
/// Threads:  no two calls at the same time.
class Sgd final : public FusedOptimizer {
public:
    /// Errors: ErrorKind::usage if a setting is out of range (momentum in [0, 1); Nesterov needs momentum), a
    /// parameter is not a dense floating-point tensor, or one is in two groups.
    explicit Sgd(const std::vector<ParameterGroup>& groups, SgdOptions options = {});

private:
    std::size_t state_count() const override { return options_.momentum == 0.0 ? 0 : 1; }
    std::vector<at::Tensor> make_state(const at::Tensor& parameter) const override;
    at::Tensor make_constant(const at::Tensor& parameter, double learning_rate, double weight_decay) const override;
    void update(const Bucket& bucket, const Settings& settings) const override;
    void update_by_torch(Bucket& bucket, const Settings& settings) const override;

    SgdOptions options_;
};

}  // namespace microbatch
