#pragma once

#include <torch/nn/module.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/pimpl.h>

#include <cstdint>

namespace microbatch {

/// Sizes of an `Mlp`.
struct MlpConfig {
    std::int64_t inputs = 784;  ///< numbers per sample, all dimensions together
    std::int64_t layers = 2;    ///< hidden layers
    std::int64_t width = 256;   ///< numbers per hidden layer
    std::int64_t classes = 10;
};

/// A multilayer perceptron: flatten, then `layers` times linear and ReLU, then linear.
///
/// Errors: ErrorKind::usage if a size is below 1.
/// State:  parameters initialised by torch's default from torch's default generator (at::manual_seed).
class MlpImpl : public torch::nn::Module {
public:
    explicit MlpImpl(const MlpConfig& config = {});

    /// Logits of the classes.
    /// Shapes: samples [b, ...] with `inputs` numbers each -> [b, classes].
    /// Errors: ErrorKind::usage if a sample does not have `inputs` numbers.
    at::Tensor forward(const at::Tensor& samples);

private:
    MlpConfig config_;
    torch::nn::Sequential layers_ = nullptr;
};
TORCH_MODULE(Mlp);

}  // namespace microbatch
