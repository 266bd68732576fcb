#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "microbatch/model/recomputable.h"

namespace microbatch {

/// Sizes of a `Llama`.
struct LlamaConfig {
    std::int64_t layers = 5;
    std::int64_t heads = 4;         ///< of queries, per layer
    std::int64_t kv_heads = 2;      ///< of keys and values; heads / kv_heads heads of queries share one
    std::int64_t width = 128;       ///< numbers per token, in all heads of queries together
    std::int64_t inner = 0;         ///< numbers per token in the MLP; 0: 8/3 width, rounded up to a multiple of 32
    std::int64_t length = 64;       ///< tokens per sample, at most
    std::int64_t vocabulary = 256;  ///< tokens are 0 to vocabulary - 1
};

/// The named sizes: llama-1m (956k parameters), llama-15m (14.7M), llama-110m (113M).
/// Errors: ErrorKind::usage, listing the names, for any other name.
LlamaConfig llama_preset(std::string_view name);

/// The numbers per token in the MLP.
/// Source: Touvron et al. 2023, arXiv:2302.13971, section 2.2: 2/3 of 4 widths.
std::int64_t inner_width(const LlamaConfig& config);

/// The number of parameters of a `Llama` of these sizes, without building it.
/// Errors: as for LlamaImpl's constructor.
std::int64_t count_parameters(const LlamaConfig& config);

class LlamaBlock;
class LanguageNorm;

/// A causal language model like Llama: rotary positions, pre-norm blocks of grouped-query attention and a gated MLP
/// (SwiGLU), RMS norms, no biases, and a head whose weight is the token embedding.
///
/// Parameters have the names of Hugging Face's LlamaForCausalLM, which loads them with tie_word_embeddings,
/// rms_norm_eps 1e-6 and rope_theta 10000.
///
/// Errors: ErrorKind::usage if a size is below 1, width is not a multiple of heads, heads not a multiple of kv_heads, a
///         head has an odd number of numbers, or the number of parameters exceeds 64 bits.
/// State:  parameters from torch's default generator (at::manual_seed): normal with deviation 0.02, divided by sqrt(2
///         layers) for the linear layers that end in the residual stream, as in a `Gpt`.
/// Source: Touvron et al. 2023, arXiv:2302.13971, section 2.2; Ainslie et al. 2023, arXiv:2305.13245, for grouped
///         queries; Radford et al. 2019, section 2.3, for the initial weights. Deviation: the head shares the
///         embedding.
/// Numerics: rotary angles in fp32, as in Hugging Face's model.
class LlamaImpl : public torch::nn::Module, public Recomputable {
public:
    explicit LlamaImpl(const LlamaConfig& config = {});

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
    const at::Tensor& head_weight() const { return embedding_->weight; }

    /// Recomputes every block, attention and MLP, in backward: see `recompute`.
    void set_recompute(bool on) override { recompute_ = on; }
    bool recomputes() const override { return recompute_; }

private:
    LlamaConfig config_;
    bool recompute_ = false;
    torch::nn::Embedding embedding_ = nullptr;
    std::vector<std::shared_ptr<LlamaBlock>> blocks_;
    std::shared_ptr<LanguageNorm> norm_;
    at::Tensor cosines_, sines_;  // [1, length, width / heads], of the rotary angles
};
TORCH_MODULE(Llama);

}  // namespace microbatch
