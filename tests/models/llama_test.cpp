#include "microbatch/models/llama.h"

#include <ATen/autocast_mode.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>

#include <cmath>
#include <string>
#include <vector>

#include "microbatch/ops/cross_entropy.h"
#include "models/modules.h"
#include "support/errors.h"
#include "support/gradients.h"
#include "support/one_thread.h"
#include "support/tensors.h"

using microbatch::Llama;
using microbatch::LlamaConfig;
using microbatch::test::relative_difference;
using microbatch::test::same_bits;

namespace {

const LlamaConfig toy = {
    .layers = 2, .heads = 4, .kv_heads = 2, .width = 16, .inner = 20, .length = 6, .vocabulary = 11};

Llama make(const LlamaConfig& config, std::uint64_t seed = 1) {
    at::manual_seed(seed);
    return Llama(config);
}

Llama make_double(const LlamaConfig& config, std::uint64_t seed = 1) {
    Llama model = make(config, seed);
    model->to(at::kDouble);
    return model;
}

/// Every parameter random and large: weights of 0.02 and scales of 1 would hide errors.
void make_large(Llama& model) {
    for (auto& parameter : model->parameters()) parameter.data().add_(at::randn_like(parameter) * 0.5);
}

at::Tensor random_tokens(const LlamaConfig& config, std::int64_t samples) {
    return at::randint(0, config.vocabulary, {samples, config.length}, at::kLong);
}

at::Tensor loss_on_tokens(Llama& model, const at::Tensor& tokens) {
    return microbatch::cross_entropy_sum(model->forward(tokens), tokens.roll(-1, 1));
}

/// Position t rotates the pair (i, i + size / 2) by t / 10000^(2 i / size), as a complex number.
at::Tensor rotated(const at::Tensor& head) {
    const std::int64_t half = head.size(2) / 2;
    const at::Tensor exponents = at::arange(half, at::kDouble) / static_cast<double>(half);
    const at::Tensor angles = at::outer(at::arange(head.size(1), at::kDouble), at::pow(10000.0, -exponents));
    const at::Tensor pairs = at::complex(head.narrow(2, 0, half), head.narrow(2, half, half));
    const at::Tensor turned = pairs * at::polar(at::ones_like(angles), angles);
    return at::cat({at::real(turned), at::imag(turned)}, 2);
}

/// The forward pass by the formulas of the papers, one head after the other.
at::Tensor reference(Llama& model, const LlamaConfig& config, const at::Tensor& tokens) {
    const auto p = model->named_parameters();
    const auto norm = [&](const at::Tensor& x, const std::string& name) {
        return x / (x.square().mean(-1, true) + 1e-6).sqrt() * p[name + ".weight"];
    };
    const auto linear = [&](const at::Tensor& x, const std::string& name) { return x.matmul(p[name + ".weight"].t()); };
    const std::int64_t length = tokens.size(1), size = config.width / config.heads;
    const at::Tensor future = at::ones({length, length}, at::kBool).triu(1);
    at::Tensor x = p["model.embed_tokens.weight"].index({tokens});
    for (std::int64_t layer = 0; layer < config.layers; ++layer) {
        const std::string block = "model.layers." + std::to_string(layer) + ".";
        const at::Tensor normed = norm(x, block + "input_layernorm");
        std::vector<at::Tensor> heads;
        for (std::int64_t head = 0; head < config.heads; ++head) {
            const auto part = [&](const char* name, std::int64_t number) {
                return linear(normed, block + "self_attn." + name).narrow(-1, number * size, size);
            };
            const std::int64_t kv = head * config.kv_heads / config.heads;
            const at::Tensor q = rotated(part("q_proj", head)), k = rotated(part("k_proj", kv));
            const at::Tensor scores = q.matmul(k.transpose(1, 2)) / std::sqrt(size);
            heads.push_back(scores.masked_fill(future, -INFINITY).softmax(-1).matmul(part("v_proj", kv)));
        }
        x = x + linear(at::cat(heads, -1), block + "self_attn.o_proj");
        const at::Tensor n = norm(x, block + "post_attention_layernorm");
        const at::Tensor gate = linear(n, block + "mlp.gate_proj");
        x = x + linear(gate * gate.sigmoid() * linear(n, block + "mlp.up_proj"), block + "mlp.down_proj");
    }
    return norm(x, "model.norm").matmul(p["model.embed_tokens.weight"].t());
}

}  // namespace

TEST(Llama, IsTheNetworkOfThePapersWithItsGradient) {
    for (const std::int64_t kv_heads : {1, 2, 4}) {
        LlamaConfig config = toy;
        config.kv_heads = kv_heads;
        Llama model = make_double(config);
        make_large(model);
        const at::Tensor tokens = random_tokens(config, 3);
        for (const std::int64_t length : {1, 4, 6}) {
            const at::Tensor part = tokens.narrow(1, 0, length);
            // The model's cosines and sines are those of fp32, up to 1 away by 6e-8.
            EXPECT_LE(relative_difference(model->forward(part), reference(model, config, part)), 1e-6) << length;
        }
        const auto gradients = [&](const at::Tensor& logits) {
            return torch::autograd::grad({microbatch::cross_entropy_sum(logits, tokens.roll(-1, 1))},
                                         model->parameters());
        };
        const auto ours = gradients(model->forward(tokens)), expected = gradients(reference(model, config, tokens));
        for (std::size_t i = 0; i < ours.size(); ++i) EXPECT_LE(relative_difference(ours[i], expected[i]), 1e-5) << i;
    }
}

TEST(Llama, IsInFp32ThatOfDouble) {
    Llama model = make(toy), exact = make_double(toy);
    const at::Tensor tokens = random_tokens(toy, 3);
    const auto gradients = [&](Llama& of) {
        return torch::autograd::grad({loss_on_tokens(of, tokens)}, of->parameters());
    };
    // fp32 through two blocks of six products each.
    EXPECT_LE(relative_difference(model->forward(tokens), exact->forward(tokens)), 3e-6);
    const auto ours = gradients(model), expected = gradients(exact);
    for (std::size_t i = 0; i < ours.size(); ++i) EXPECT_LE(relative_difference(ours[i], expected[i]), 2e-5) << i;
}

TEST(Llama, HasTheSameGradientOfABatchHoweverItIsSplit) {
    Llama model = make_double(toy);
    make_large(model);
    const at::Tensor tokens = random_tokens(toy, 6);
    const auto gradients = [&](const std::vector<std::int64_t>& sizes) {
        model->zero_grad();
        std::int64_t first = 0;
        for (const std::int64_t size : sizes) {
            loss_on_tokens(model, tokens.narrow(0, first, size)).backward();
            first += size;
        }
        std::vector<at::Tensor> found;
        for (const at::Tensor& parameter : model->parameters()) found.push_back(parameter.grad().clone());
        return found;
    };
    const auto whole = gradients({6});
    for (const auto& sizes : {std::vector<std::int64_t>{1, 1, 1, 1, 1, 1}, {4, 2}, {1, 5}}) {
        const auto split = gradients(sizes);
        // fp64: a sum in another order.
        for (std::size_t i = 0; i < whole.size(); ++i) EXPECT_LE(relative_difference(split[i], whole[i]), 1e-13) << i;
    }
}

TEST(Llama, DependsOnlyOnEarlierTokens) {
    Llama model = make(toy);
    const at::Tensor tokens = random_tokens(toy, 2);
    const at::Tensor before = model->forward(tokens);
    for (std::int64_t t = 0; t < toy.length; ++t) {
        at::Tensor changed = tokens.clone();
        changed.select(1, t).add_(1).remainder_(toy.vocabulary);
        const at::Tensor after = model->forward(changed);
        EXPECT_TRUE(at::equal(after.narrow(1, 0, t), before.narrow(1, 0, t))) << t;
        const at::Tensor difference = (after - before).abs().amax({0, 2});
        for (std::int64_t later = t; later < toy.length; ++later) {
            EXPECT_GT(difference[later].item<double>(), 0) << t << " does not reach " << later;
        }
    }
}

TEST(Llama, KnowsTheOrderOfTokens) {
    Llama model = make_double(toy);
    const at::Tensor last =
        model->forward(microbatch::test::tensor_of({1, 2, 3, 4}, at::kLong).view({1, 4})).select(1, 3);
    const at::Tensor swapped =
        model->forward(microbatch::test::tensor_of({2, 1, 3, 4}, at::kLong).view({1, 4})).select(1, 3);
    EXPECT_GT((last - swapped).abs().max().item<double>(), 1e-9);  // a permutation of equal terms rounds at 1e-17
}

TEST(Llama, UsesTheFusedBlockAndNorm) {
    Llama model = make(toy);
    const at::Tensor hidden = model->hidden(random_tokens(toy, 2));
    const auto norm = hidden.grad_fn();
    EXPECT_NE(norm->name().find("FusedRmsNorm"), std::string::npos) << norm->name();
    const std::string block = norm->next_edge(0).function->name();
    EXPECT_NE(block.find("FusedLlama"), std::string::npos) << block;
}

TEST(Llama, RunsUnderAutocast) {
    Llama model = make(toy);
    const at::Tensor tokens = random_tokens(toy, 2), exact = model->forward(tokens);
    at::autocast::set_autocast_enabled(at::kCPU, true);
    at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
    const at::Tensor logits = model->forward(tokens);
    at::autocast::clear_cache();
    at::autocast::set_autocast_enabled(at::kCPU, false);
    EXPECT_EQ(logits.scalar_type(), at::kBFloat16);
    EXPECT_LE(relative_difference(logits, exact), 0.05);  // a dozen roundings to 8 bits
    logits.sum().backward();
    for (const at::Tensor& parameter : model->parameters()) EXPECT_TRUE(parameter.grad().isfinite().all().item<bool>());
}

TEST(Llama, RecomputesToTheSameBits) {
    const auto train = [](bool on) {
        Llama model = make(toy);
        model->set_recompute(on);
        EXPECT_EQ(model->recomputes(), on);
        std::vector<at::Tensor> all;
        for (int micro_batch = 0; micro_batch < 3; ++micro_batch) {
            const at::Tensor loss = loss_on_tokens(model, random_tokens(toy, 8));
            loss.backward();
            all.push_back(loss.detach());
        }
        for (const at::Tensor& parameter : model->parameters()) all.push_back(parameter.grad());
        all.push_back(at::rand({1}));  // the generator is where it would have been
        return all;
    };
    for (const int threads : {1, 2}) {
        at::set_num_threads(threads);
        const auto plain = train(false), recomputed = train(true);
        for (std::size_t i = 0; i < plain.size(); ++i) EXPECT_TRUE(same_bits(recomputed[i], plain[i])) << i;
    }
    at::set_num_threads(1);
}

TEST(Llama, IsTheSameForTheSameSeed) {
    const at::Tensor tokens = random_tokens(toy, 2);
    EXPECT_TRUE(at::equal(make(toy, 3)->forward(tokens), make(toy, 3)->forward(tokens)));
    EXPECT_FALSE(at::equal(make(toy, 3)->forward(tokens), make(toy, 4)->forward(tokens)));
}

TEST(Llama, GivesItsScoresAsHiddenTimesTheEmbedding) {
    Llama model = make(toy);
    const at::Tensor tokens = random_tokens(toy, 2), hidden = model->hidden(tokens);
    EXPECT_EQ(hidden.sizes(), at::IntArrayRef({2, 6, 16}));
    EXPECT_EQ(model->forward(tokens).sizes(), at::IntArrayRef({2, 6, 11}));
    EXPECT_TRUE(at::equal(at::linear(hidden, model->head_weight()), model->forward(tokens)));
    EXPECT_TRUE(model->head_weight().is_same(model->named_parameters()["model.embed_tokens.weight"]));
}

TEST(Llama, LearnsAFixedBatch) {
    at::manual_seed(1);
    LlamaConfig config = toy;
    config.width = 32;
    Llama model(config);
    const at::Tensor tokens = random_tokens(config, 4);
    microbatch::test::expect_learns(
        *model, [&] { return loss_on_tokens(model, tokens) / 24; }, 0.5, 100);
}

TEST(Llama, RefusesInvalidSamples) {
    Llama model = make(toy);
    const auto expect_refused = [&](const at::Tensor& tokens, const std::string& part) {
        microbatch::test::expect_usage_error({"llama: ", part}, [&] { model->forward(tokens); });
    };
    expect_refused(at::zeros({1, 7}, at::kLong), "7 tokens, but the model accepts 1 to 6");
    expect_refused(at::zeros({1, 0}, at::kLong), "0 tokens, but the model accepts 1 to 6");
    expect_refused(at::zeros({6}, at::kLong), "Long of shape [6]");
    expect_refused(at::zeros({1, 6}, at::kByte), "Byte of shape [1, 6]");
    EXPECT_THROW(model->forward(at::full({1, 6}, 11, at::kLong)), c10::IndexError);
}
