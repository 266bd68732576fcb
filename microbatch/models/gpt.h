#pragma once

#include <torch/nn/module.h>
#include <torch/nn/modules/dropout.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "microbatch/model/recomputable.h"

namespace microbatch {

/// The norm before attention, before the MLP and before the head: see rms_norm for the second one.
enum class GptNorm { layer, rms };

/// "layer" or "rms".
std::string_view to_string(GptNorm norm);

/// Parses the name. Errors: ErrorKind::usage, listing the names, for any other text.
GptNorm parse_gpt_norm(std::string_view name);

/// Sizes of a `Gpt`.
struct GptConfig {
    std::int64_t layers = 4;
    std::int64_t heads = 4;         ///< attention heads per layer
    std::int64_t width = 128;       ///< numbers per token, in all heads together
    std::int64_t length = 64;       ///< tokens per sample, at most
    std::int64_t vocabulary = 256;  ///< tokens are 0 to vocabulary - 1
    double dropout = 0;             ///< share set to 0 in the embeddings and in the outputs of attention and MLP
    GptNorm norm = GptNorm::layer;
};

/// The named sizes: gpt-tiny (0.8M parameters), gpt-small (10.8M), gpt2 (124M).
/// Errors: ErrorKind::usage, listing the names, for any other name.
GptConfig gpt_preset(std::string_view name);

/// The number of parameters of a `Gpt` of these sizes, without building it.
/// Errors: as for GptImpl's constructor.
std::int64_t count_parameters(const GptConfig& config);

class GptBlock;
class LanguageNorm;

/// A causal language model like GPT-2: learned positions, pre-norm blocks of attention and MLP, and a head whose weight
/// is the token embedding: one parameter, "token_embedding.weight".
///
/// Errors: ErrorKind::usage if a size is below 1, width is not a multiple of heads, dropout is outside [0, 1), or the
///         number of parameters exceeds 64 bits.
/// State:  parameters from torch's default generator (at::manual_seed): normal with deviation 0.02, divided by sqrt(2
///         layers) for the linear layers that end in the residual stream; biases 0. In training mode, dropout draws
///         from the same generator, unless it is 0.
/// Source: Radford et al. 2019 (GPT-2), section 2.3.
/// Cost:   dropout is not applied to the attention weights, because torch's attention would then need memory quadratic
///         in T.
class GptImpl : public torch::nn::Module, public Recomputable {
public:
    explicit GptImpl(const GptConfig& config = {});

    /// Logits of the next token; those at t depend only on the tokens up to t.
    /// Shapes: tokens [b, T], int64, 1 <= T <= length -> [b, T, vocabulary].
    /// Errors: ErrorKind::usage for another shape or type; on the CPU, torch's c10::IndexError for a token outside [0,
    ///         vocabulary).
    at::Tensor forward(const at::Tensor& tokens);

    /// The input of the head: forward(tokens) is at::linear(hidden(tokens), head_weight()). With
    /// `linear_cross_entropy_sum`, the loss does not need logits of size [b, T, vocabulary].
    /// Shapes: tokens [b, T] -> [b, T, width].
    /// Errors: as for forward.
    at::Tensor hidden(const at::Tensor& tokens);

    /// Shapes: [vocabulary, width].
    const at::Tensor& head_weight() const { return token_embedding_->weight; }

    /// Recomputes every block, attention and MLP, in backward: see `recompute`.
    void set_recompute(bool on) override { recompute_ = on; }
    bool recomputes() const override { return recompute_; }

private:
    GptConfig config_;
    bool recompute_ = false;
    torch::nn::Embedding token_embedding_ = nullptr;
    torch::nn::Embedding position_embedding_ = nullptr;
    torch::nn::Dropout dropout_ = nullptr;
    std::vector<std::shared_ptr<GptBlock>> blocks_;
    std::shared_ptr<LanguageNorm> norm_;
};
TORCH_MODULE(Gpt);

}  // namespace microbatch
