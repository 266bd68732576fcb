#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>

#include <cstdint>
#include <string_view>

namespace microbatch {

/// What the language models are made of.

/// The norm before each half of a block: an RMS norm, or, with a bias, a layer norm.
class LanguageNorm : public torch::nn::Module {
public:
    LanguageNorm(std::int64_t width, bool biased, double epsilon);

    at::Tensor forward(const at::Tensor& x) const;

    at::Tensor weight;     ///< [width], ones at first
    at::Tensor bias = {};  ///< [width], zeros at first; undefined in an RMS norm

private:
    double epsilon_;
};

/// Deviation of the initial weights (Radford et al. 2019).
constexpr double init_deviation = 0.02;

/// Deviation of weights that end in the residual stream. Each block adds to the stream twice; this keeps the sum's
/// variance independent of the depth.
double projection_deviation(std::int64_t layers);

/// Weights are normal with this deviation, the bias is 0.
torch::nn::Linear make_linear(std::int64_t inputs, std::int64_t outputs, double deviation, bool biased);

torch::nn::Embedding make_embedding(std::int64_t rows, std::int64_t width);

/// Errors: ErrorKind::usage, naming the model, unless the tokens are int64 of shape [samples, 1 to length].
void require_tokens(std::string_view model, const at::Tensor& tokens, std::int64_t length);

}  // namespace microbatch
