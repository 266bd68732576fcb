#include "microbatch/models/language_layers.h"

#include <ATen/ops/layer_norm.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <torch/nn/init.h>

#include <cmath>

#include "microbatch/core/error.h"
#include "microbatch/ops/rms_norm.h"

namespace microbatch {

LanguageNorm::LanguageNorm(std::int64_t width, bool biased, double epsilon) : epsilon_(epsilon) {
    weight = register_parameter("weight", at::ones({width}));
    if (biased) bias = register_parameter("bias", at::zeros({width}));
}

at::Tensor LanguageNorm::forward(const at::Tensor& x) const {
    return bias.defined() ? at::layer_norm(x, x.size(-1), weight, bias, epsilon_) : rms_norm(x, weight, epsilon_);
}

double projection_deviation(std::int64_t layers) {
    return init_deviation / std::sqrt(2.0 * static_cast<double>(layers));
}

torch::nn::Linear make_linear(std::int64_t inputs, std::int64_t outputs, double deviation, bool biased) {
    torch::nn::Linear linear(torch::nn::LinearOptions(inputs, outputs).bias(biased));
    torch::nn::init::normal_(linear->weight, 0, deviation);
    if (biased) torch::nn::init::zeros_(linear->bias);
    return linear;
}

torch::nn::Embedding make_embedding(std::int64_t rows, std::int64_t width) {
    torch::nn::Embedding embedding(rows, width);
    torch::nn::init::normal_(embedding->weight, 0, init_deviation);
    return embedding;
}

void require_tokens(std::string_view model, const at::Tensor& tokens, std::int64_t length) {
    require_that(tokens.dim() == 2 && tokens.scalar_type() == at::kLong, model, ": the tokens are ",
                 tokens.scalar_type(), " of shape ", tokens.sizes(), "; give int64 of shape [samples, tokens]");
    const std::int64_t given = tokens.size(1);
    require_that(given >= 1 && given <= length, model, ": a sample has ", given, " tokens, but the model accepts 1 to ",
                 length, "; shorten the samples or set length");
}

}  // namespace microbatch
