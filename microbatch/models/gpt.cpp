#include "microbatch/models/gpt.h"

#include <torch/nn/init.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/linear.h>

#include <cmath>

#include "microbatch/autograd/recompute.h"
#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"
#include "microbatch/models/checks.h"
#include "microbatch/ops/transformer_block.h"

namespace microbatch {

namespace {

using torch::nn::Dropout;
using torch::nn::Embedding;
using torch::nn::LayerNorm;
using torch::nn::LayerNormOptions;
using torch::nn::Linear;

constexpr double init_deviation = 0.02;

Linear make_linear(std::int64_t inputs, std::int64_t outputs, double deviation) {
    Linear linear(inputs, outputs);
    torch::nn::init::normal_(linear->weight, 0, deviation);
    torch::nn::init::zeros_(linear->bias);
    return linear;
}

Embedding make_embedding(std::int64_t rows, std::int64_t width) {
    Embedding embedding(rows, width);
    torch::nn::init::normal_(embedding->weight, 0, init_deviation);
    return embedding;
}

/// Each block adds to the residual stream twice; this keeps the sum's variance independent of the depth.
Linear make_projection(std::int64_t inputs, const GptConfig& config) {
    return make_linear(inputs, config.width, init_deviation / std::sqrt(2.0 * static_cast<double>(config.layers)));
}

/// Under the names of the parts of a block; transformer_block() computes with them.
class Attention : public torch::nn::Module {
public:
    explicit Attention(const GptConfig& config)
        : qkv(register_module("qkv", make_linear(config.width, 3 * config.width, init_deviation))),
          projection(register_module("projection", make_projection(config.width, config))),
          dropout(register_module("dropout", Dropout(config.dropout))) {}

    Linear qkv;
    Linear projection;
    Dropout dropout;
};

class FeedForward : public torch::nn::Module {
public:
    explicit FeedForward(const GptConfig& config)
        : expansion(register_module("expansion", make_linear(config.width, 4 * config.width, init_deviation))),
          projection(register_module("projection", make_projection(4 * config.width, config))),
          dropout(register_module("dropout", Dropout(config.dropout))) {}

    Linear expansion;
    Linear projection;
    Dropout dropout;
};

double share_of(const Dropout& dropout) {
    return dropout->is_training() ? dropout->options.p() : 0.0;
}

void require_valid(const GptConfig& config) {
    require_size("gpt", "layers", config.layers);
    require_size("gpt", "heads", config.heads);
    require_size("gpt", "width", config.width);
    require_size("gpt", "length", config.length);
    require_size("gpt", "vocabulary", config.vocabulary);
    if (config.width % config.heads != 0) {
        throw Error(ErrorKind::usage,
                    str_cat("gpt: width ", config.width, " is not a multiple of heads ", config.heads));
    }
    if (!(config.dropout >= 0 && config.dropout < 1)) {
        throw Error(ErrorKind::usage, str_cat("gpt: dropout is ", config.dropout, "; give at least 0 and less than 1"));
    }
}

template <class Number>
Number parameters_as(const GptConfig& config) {
    const auto width = static_cast<Number>(config.width);
    const Number block = 12 * width * width + 13 * width;  // 4 linear layers with biases, 2 layer norms
    const auto rows = static_cast<Number>(config.vocabulary + config.length + 2);  // 2: the last layer norm
    return static_cast<Number>(config.layers) * block + rows * width;
}

}  // namespace

class GptBlock : public torch::nn::Module {
public:
    explicit GptBlock(const GptConfig& config)
        : heads_(config.heads),
          attention_norm_(register_module("attention_norm", LayerNorm(LayerNormOptions({config.width})))),
          attention_(register_module("attention", std::make_shared<Attention>(config))),
          mlp_norm_(register_module("mlp_norm", LayerNorm(LayerNormOptions({config.width})))),
          mlp_(register_module("mlp", std::make_shared<FeedForward>(config))) {}

    at::Tensor forward(const at::Tensor& x) {
        return transformer_block(
            x,
            {attention_norm_->weight, attention_norm_->bias, attention_->qkv->weight, attention_->qkv->bias,
             attention_->projection->weight, attention_->projection->bias, mlp_norm_->weight, mlp_norm_->bias,
             mlp_->expansion->weight, mlp_->expansion->bias, mlp_->projection->weight, mlp_->projection->bias},
            heads_, {share_of(attention_->dropout), share_of(mlp_->dropout)});
    }

private:
    std::int64_t heads_;
    LayerNorm attention_norm_;
    std::shared_ptr<Attention> attention_;
    LayerNorm mlp_norm_;
    std::shared_ptr<FeedForward> mlp_;
};

GptConfig gpt_preset(std::string_view name) {
    if (name == "gpt-tiny") return {};
    if (name == "gpt-small") return {.layers = 6, .heads = 6, .width = 384, .length = 256};
    if (name == "gpt2") return {.layers = 12, .heads = 12, .width = 768, .length = 1024, .vocabulary = 50257};
    throw Error(ErrorKind::usage, str_cat("unknown GPT \"", name, "\"; choose gpt-tiny, gpt-small or gpt2"));
}

std::int64_t count_parameters(const GptConfig& config) {
    require_valid(config);
    const double estimate = parameters_as<double>(config);
    if (estimate > 0x1p62) {
        throw Error(ErrorKind::usage, str_cat("gpt: ", estimate, " parameters are too many; layers ", config.layers,
                                              " or width ", config.width, " is too large"));
    }
    return parameters_as<std::int64_t>(config);
}

GptImpl::GptImpl(const GptConfig& config) : config_(config) {
    count_parameters(config);
    token_embedding_ = register_module("token_embedding", make_embedding(config.vocabulary, config.width));
    position_embedding_ = register_module("position_embedding", make_embedding(config.length, config.width));
    dropout_ = register_module("dropout", Dropout(config.dropout));
    torch::nn::ModuleList blocks = register_module("blocks", torch::nn::ModuleList());
    for (std::int64_t layer = 0; layer < config.layers; ++layer) {
        blocks_.push_back(std::make_shared<GptBlock>(config));
        blocks->push_back(blocks_.back());
    }
    norm_ = register_module("norm", LayerNorm(LayerNormOptions({config.width})));
}

at::Tensor GptImpl::hidden(const at::Tensor& tokens) {
    if (tokens.dim() != 2 || tokens.scalar_type() != at::kLong) {
        throw Error(ErrorKind::usage, str_cat("gpt: the tokens are ", tokens.scalar_type(), " of shape ",
                                              tokens.sizes(), "; give int64 of shape [samples, tokens]"));
    }
    const std::int64_t length = tokens.size(1);
    if (length < 1 || length > config_.length) {
        throw Error(ErrorKind::usage, str_cat("gpt: a sample has ", length, " tokens, but the model accepts 1 to ",
                                              config_.length, "; shorten the samples or set length"));
    }
    at::Tensor x = token_embedding_->forward(tokens) + position_embedding_->weight.narrow(0, 0, length);
    x = dropout_->forward(x);
    for (const auto& block : blocks_) {
        const auto run = [block](const at::Tensor& input) { return block->forward(input); };
        x = recompute_ ? recompute(run, x, block) : run(x);
    }
    return norm_->forward(x);
}

at::Tensor GptImpl::forward(const at::Tensor& tokens) {
    return at::linear(hidden(tokens), head_weight());
}

}  // namespace microbatch
