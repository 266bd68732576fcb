#include "microbatch/models/llama.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/outer.h>
#include <ATen/ops/pow.h>
#include <torch/nn/modules/container/modulelist.h>

#include "microbatch/autograd/recompute.h"
#include "microbatch/core/error.h"
#include "microbatch/models/checks.h"
#include "microbatch/models/language_layers.h"
#include "microbatch/ops/llama_block.h"

namespace microbatch {

namespace {

using torch::nn::Linear;

constexpr double epsilon = 1e-6;       // of the norms
constexpr double rotary_base = 10000;  // Su et al. 2021, section 3.2.2

/// Registers a linear layer without a bias in a module.
Linear add_linear(torch::nn::Module& to, const char* name, std::int64_t inputs, std::int64_t outputs,
                  double deviation = init_deviation) {
    return to.register_module(name, make_linear(inputs, outputs, deviation, /*biased=*/false));
}

std::shared_ptr<LanguageNorm> add_norm(torch::nn::Module& to, const char* name, const LlamaConfig& config) {
    return to.register_module(name, std::make_shared<LanguageNorm>(config.width, /*biased=*/false, epsilon));
}

std::shared_ptr<torch::nn::Module> add_group(torch::nn::Module& to, const char* name) {
    return to.register_module(name, std::make_shared<torch::nn::Module>());
}

std::int64_t head_size(const LlamaConfig& config) {
    return config.width / config.heads;
}

void require_valid(const LlamaConfig& config) {
    require_size("llama", "layers", config.layers);
    require_size("llama", "heads", config.heads);
    require_size("llama", "kv_heads", config.kv_heads);
    require_size("llama", "width", config.width);
    require_size("llama", "inner", inner_width(config));
    require_size("llama", "length", config.length);
    require_size("llama", "vocabulary", config.vocabulary);
    require_that(config.width % config.heads == 0, "llama: width ", config.width, " is not a multiple of heads ",
                 config.heads);
    require_that(config.heads % config.kv_heads == 0, "llama: heads ", config.heads, " is not a multiple of kv_heads ",
                 config.kv_heads, "; give kv_heads that divide heads");
    require_that(head_size(config) % 2 == 0, "llama: a head has ", head_size(config), " numbers (width ", config.width,
                 " / heads ", config.heads, "), which must be even: rotary positions rotate pairs of them");
}

template <class Number>
Number parameters_as(const LlamaConfig& config) {
    const auto width = static_cast<Number>(config.width), inner = static_cast<Number>(inner_width(config));
    const Number kv = static_cast<Number>(config.kv_heads * head_size(config));
    const Number block = width * (2 * width + 2 * kv + 3 * inner + 2);  // 7 linear layers, 2 norms
    return static_cast<Number>(config.layers) * block + static_cast<Number>(config.vocabulary + 1) * width;
}

/// Angles of the rotary positions, [1, length, size]: in each half of a head t / base^(2i / size) for i = 0, 1, ...
at::Tensor rotary_angles(std::int64_t length, std::int64_t size) {
    const at::Tensor exponents = at::arange(0, size, 2, at::kFloat) / static_cast<double>(size);
    const at::Tensor half = at::outer(at::arange(length, at::kFloat), at::pow(rotary_base, exponents).reciprocal());
    return at::cat({half, half}, 1).unsqueeze(0);
}

}  // namespace

class LlamaBlock : public torch::nn::Module {
public:
    explicit LlamaBlock(const LlamaConfig& config) : details_{config.heads, config.kv_heads, epsilon} {
        const std::int64_t width = config.width, inner = inner_width(config);
        const std::int64_t kv = config.kv_heads * head_size(config);
        const double projected = projection_deviation(config.layers);
        const auto attention = add_group(*this, "self_attn"), mlp = add_group(*this, "mlp");
        q_ = add_linear(*attention, "q_proj", width, width);
        k_ = add_linear(*attention, "k_proj", width, kv);
        v_ = add_linear(*attention, "v_proj", width, kv);
        projection_ = add_linear(*attention, "o_proj", width, width, projected);
        gate_ = add_linear(*mlp, "gate_proj", width, inner);
        expansion_ = add_linear(*mlp, "up_proj", width, inner);
        contraction_ = add_linear(*mlp, "down_proj", inner, width, projected);
        attention_norm_ = add_norm(*this, "input_layernorm", config);
        mlp_norm_ = add_norm(*this, "post_attention_layernorm", config);
    }

    at::Tensor forward(const at::Tensor& x, const at::Tensor& cosines, const at::Tensor& sines) {
        return llama_block(x, cosines, sines,
                           {.attention_norm_scale = attention_norm_->weight,
                            .q_weight = q_->weight,
                            .k_weight = k_->weight,
                            .v_weight = v_->weight,
                            .projection_weight = projection_->weight,
                            .mlp_norm_scale = mlp_norm_->weight,
                            .gate_weight = gate_->weight,
                            .expansion_weight = expansion_->weight,
                            .contraction_weight = contraction_->weight},
                           details_);
    }

private:
    LlamaDetails details_;
    Linear q_ = nullptr, k_ = nullptr, v_ = nullptr, projection_ = nullptr;
    Linear gate_ = nullptr, expansion_ = nullptr, contraction_ = nullptr;
    std::shared_ptr<LanguageNorm> attention_norm_, mlp_norm_;
};

LlamaConfig llama_preset(std::string_view name) {
    if (name == "llama-1m") return {};
    if (name == "llama-15m") return {.layers = 9, .heads = 6, .kv_heads = 3, .width = 384, .length = 256};
    if (name == "llama-110m") {
        return {.layers = 14, .heads = 12, .kv_heads = 4, .width = 768, .length = 1024, .vocabulary = 32000};
    }
    throw Error(ErrorKind::usage, "unknown Llama \"", name, "\"; choose llama-1m, llama-15m or llama-110m");
}

std::int64_t inner_width(const LlamaConfig& config) {
    if (config.inner != 0) return config.inner;
    return (config.width * 8 + 95) / 96 * 32;
}

std::int64_t count_parameters(const LlamaConfig& config) {
    require_valid(config);
    require_countable("llama", parameters_as<double>(config), config.layers, config.width);
    return parameters_as<std::int64_t>(config);
}

LlamaImpl::LlamaImpl(const LlamaConfig& config) : config_(config) {
    count_parameters(config);
    const auto body = add_group(*this, "model");
    embedding_ = body->register_module("embed_tokens", make_embedding(config.vocabulary, config.width));
    torch::nn::ModuleList blocks = body->register_module("layers", torch::nn::ModuleList());
    for (std::int64_t layer = 0; layer < config.layers; ++layer) {
        blocks_.push_back(std::make_shared<LlamaBlock>(config));
        blocks->push_back(blocks_.back());
    }
    norm_ = add_norm(*body, "norm", config);
    const at::Tensor angles = rotary_angles(config.length, head_size(config));
    cosines_ = angles.cos();
    sines_ = angles.sin();
}

at::Tensor LlamaImpl::hidden(const at::Tensor& tokens) {
    require_tokens("llama", tokens, config_.length);
    at::Tensor x = embedding_->forward(tokens);
    // Once for all blocks, which need a row for every token.
    const auto rows_of = [&](const at::Tensor& table) {
        const at::Tensor rows = table.narrow(1, 0, tokens.size(1)).to(x.options());
        return rows.expand({x.size(0), rows.size(1), rows.size(2)}).contiguous();
    };
    const at::Tensor cosines = rows_of(cosines_), sines = rows_of(sines_);
    for (const auto& block : blocks_) {
        const auto run = [=](const at::Tensor& input) { return block->forward(input, cosines, sines); };
        x = recompute_ ? recompute(run, x, block) : run(x);
    }
    return norm_->forward(x);
}

at::Tensor LlamaImpl::forward(const at::Tensor& tokens) {
    return at::linear(hidden(tokens), head_weight());
}

}  // namespace microbatch
