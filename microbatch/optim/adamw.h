#pragma once

#include "microbatch/optim/fused_optimizer.h"

namespace microbatch {

struct AdamWOptions {
    double learning_rate = 1e-3;
    double beta1 = 0.9;
    double beta2 = 0.999;
    double epsilon = 1e-8;
};

/// AdamW in one pass over parameter, gradient and both moments, including the division of the gradient.
///
/// Formula:  theta -= eta lambda theta;  m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2;
///           theta -= eta (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps).
/// Source:   Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2, with eta lambda instead of lambda, as in
///           torch::optim::AdamW.
/// State:    two moments and a step count per parameter, created with its first gradient; a parameter without a
///           gradient is not changed. Memory: 2 x parameter.
/// Threads:  no two calls at the same time.
class AdamW final : public FusedOptimizer {
public:
    /// Errors: ErrorKind::usage if a setting is out of range (betas in [0, 1), the others finite and >= 0), a
    /// parameter is not a dense floating-point tensor, or one is in two groups.
    explicit AdamW(const std::vector<ParameterGroup>& groups, AdamWOptions options = {});

private:
    std::size_t state_count() const override { return 3; }
    std::vector<at::Tensor> make_state(const at::Tensor& parameter) const override;
    at::Tensor make_constant(const at::Tensor& parameter, double learning_rate, double weight_decay) const override;
    void update(const Bucket& bucket, const Settings& settings) const override;
    void update_by_torch(Bucket& bucket, const Settings& settings) const override;

    AdamWOptions options_;
};

}  // namespace microbatch
