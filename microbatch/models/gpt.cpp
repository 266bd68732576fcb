#include "microbatch/models/gpt.h"

#include <torch/nn/modules/container/modulelist.h>

#include "microbatch/autograd/recompute.h"
#include "microbatch/core/error.h"
#include "microbatch/models/checks.h"
#include "microbatch/models/language_layers.h"
#include "microbatch/ops/transformer_block.h"

namespace microbatch {

namespace {

using torch::nn::Dropout;
using torch::nn::Linear;

constexpr double epsilon = 1e-5;  // of the norms

std::shared_ptr<LanguageNorm> make_norm(const GptConfig& config) {
    return std::make_shared<LanguageNorm>(config.width, config.norm == GptNorm::layer, epsilon);
}

/// Attention or the MLP of a block: a linear layer, and the projection back into the residual stream. transformer_block()
/// computes with them.
class Sublayer : public torch::nn::Module {
public:
    Sublayer(const GptConfig& config, const char* name, std::int64_t outputs, std::int64_t projected)
        : linear(register_module(name, make_linear(config.width, outputs, init_deviation, /*biased=*/true))),
          projection(register_module("projection", make_linear(projected, config.width,
                                                               projection_deviation(config.layers), /*biased=*/true))),
          dropout(register_module("dropout", Dropout(config.dropout))) {}

    Linear linear;
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
    require_that(config.width % config.heads == 0, "gpt: width ", config.width, " is not a multiple of heads ",
                 config.heads);
    require_that(config.dropout >= 0 && config.dropout < 1, "gpt: dropout is ", config.dropout,
                 "; give at least 0 and less than 1");
}

template <class Number>
Number parameters_as(const GptConfig& config) {
    const auto width = static_cast<Number>(config.width);
    const Number norm = config.norm == GptNorm::layer ? 2 : 1;         // vectors of its parameters
    const Number block = 12 * width * width + (9 + 2 * norm) * width;  // 4 linear layers with biases, 2 norms
    const Number rows = static_cast<Number>(config.vocabulary + config.length) + norm;
    return static_cast<Number>(config.layers) * block + rows * width;
}

}  // namespace

class GptBlock : public torch::nn::Module {
public:
    explicit GptBlock(const GptConfig& config)
        : heads_(config.heads),
          attention_norm_(register_module("attention_norm", make_norm(config))),
          attention_(
              register_module("attention", std::make_shared<Sublayer>(config, "qkv", 3 * config.width, config.width))),
          mlp_norm_(register_module("mlp_norm", make_norm(config))),
          mlp_(register_module("mlp",
                               std::make_shared<Sublayer>(config, "expansion", 4 * config.width, 4 * config.width))) {}

    at::Tensor forward(const at::Tensor& x) {
        return transformer_block(
            x,
            {attention_norm_->weight, attention_norm_->bias, attention_->linear->weight, attention_->linear->bias,
             attention_->projection->weight, attention_->projection->bias, mlp_norm_->weight, mlp_norm_->bias,
             mlp_->linear->weight, mlp_->linear->bias, mlp_->projection->weight, mlp_->projection->bias},
            heads_, {share_of(attention_->dropout), share_of(mlp_->dropout)}, {.epsilon = epsilon});
    }

private:
    std::int64_t heads_;
    std::shared_ptr<LanguageNorm> attention_norm_;
    std::shared_ptr<Sublayer> attention_;
    std::shared_ptr<LanguageNorm> mlp_norm_;
    std::shared_ptr<Sublayer> mlp_;
};

std::string_view to_string(GptNorm norm) {
    return norm == GptNorm::layer ? "layer" : "rms";
}

GptNorm parse_gpt_norm(std::string_view name) {
    if (name == "layer") return GptNorm::layer;
    if (name == "rms") return GptNorm::rms;
    throw Error(ErrorKind::usage, "\"", name, "\" is not a norm of a gpt; choose layer or rms");
}

GptConfig gpt_preset(std::string_view name) {
    if (name == "gpt-tiny") return {};
    if (name == "gpt-small") return {.layers = 6, .heads = 6, .width = 384, .length = 256};
    if (name == "gpt2") return {.layers = 12, .heads = 12, .width = 768, .length = 1024, .vocabulary = 50257};
    throw Error(ErrorKind::usage, "unknown GPT \"", name, "\"; choose gpt-tiny, gpt-small or gpt2");
}

std::int64_t count_parameters(const GptConfig& config) {
    require_valid(config);
    require_countable("gpt", parameters_as<double>(config), config.layers, config.width);
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
    norm_ = register_module("norm", make_norm(config));
}

at::Tensor GptImpl::hidden(const at::Tensor& tokens) {
    require_tokens("gpt", tokens, config_.length);
    at::Tensor x = token_embedding_->forward(tokens) + position_embedding_->weight.narrow(0, 0, tokens.size(1));
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
