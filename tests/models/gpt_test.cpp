#include "microbatch/models/gpt.h"

#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>

#include <cmath>
#include <set>
#include <string>
#include <vector>

#include "microbatch/ops/cross_entropy.h"
#include "models/modules.h"
#include "support/errors.h"
#include "support/gradients.h"
#include "support/one_thread.h"
#include "support/tensors.h"

using microbatch::Gpt;
using microbatch::GptConfig;
using microbatch::GptNorm;

namespace {

const GptConfig toy = {.layers = 2, .heads = 2, .width = 8, .length = 6, .vocabulary = 11};

Gpt make(const GptConfig& config, std::uint64_t seed = 1) {
    at::manual_seed(seed);
    return Gpt(config);
}

Gpt make_double(const GptConfig& config, std::uint64_t seed = 1) {
    Gpt model = make(config, seed);
    model->to(at::kDouble);
    return model;
}

at::Tensor random_tokens(const GptConfig& config, std::int64_t samples) {
    return at::randint(0, config.vocabulary, {samples, config.length}, at::kLong);
}

at::Tensor loss_on_tokens(Gpt& model, const at::Tensor& tokens) {
    return microbatch::cross_entropy_sum(model->forward(tokens), tokens.roll(-1, 1));
}

/// The forward pass by the formulas of the GPT-2 paper, without torch's modules, one head after the other.
at::Tensor reference(Gpt& model, const GptConfig& config, const at::Tensor& tokens) {
    const auto p = model->named_parameters();
    const auto norm = [&](const at::Tensor& x, const std::string& name) {
        if (config.norm == GptNorm::rms) return x / (x.square().mean(-1, true) + 1e-5).sqrt() * p[name + ".weight"];
        const at::Tensor centred = x - x.mean(-1, true);
        return centred / (centred.square().mean(-1, true) + 1e-5).sqrt() * p[name + ".weight"] + p[name + ".bias"];
    };
    const auto linear = [&](const at::Tensor& x, const std::string& name) {
        return x.matmul(p[name + ".weight"].t()) + p[name + ".bias"];
    };
    const std::int64_t length = tokens.size(1), depth = config.width / config.heads;
    const at::Tensor future = at::ones({length, length}, at::kBool).triu(1);
    at::Tensor x = p["token_embedding.weight"].index({tokens}) + p["position_embedding.weight"].slice(0, 0, length);
    for (std::int64_t layer = 0; layer < config.layers; ++layer) {
        const std::string block = "blocks." + std::to_string(layer) + ".";
        const auto qkv = linear(norm(x, block + "attention_norm"), block + "attention.qkv").chunk(3, -1);
        std::vector<at::Tensor> heads;
        for (std::int64_t head = 0; head < config.heads; ++head) {
            const auto part = [&](int i) { return qkv[i].narrow(-1, head * depth, depth); };
            const at::Tensor scores = part(0).matmul(part(1).transpose(1, 2)) / std::sqrt(depth);
            heads.push_back(scores.masked_fill(future, -INFINITY).softmax(-1).matmul(part(2)));
        }
        x = x + linear(at::cat(heads, -1), block + "attention.projection");
        const at::Tensor h = linear(norm(x, block + "mlp_norm"), block + "mlp.expansion");
        const at::Tensor gelu = 0.5 * h * (1 + ((h + 0.044715 * h.pow(3)) * std::sqrt(2 / M_PI)).tanh());
        x = x + linear(gelu, block + "mlp.projection");
    }
    return norm(x, "norm").matmul(p["token_embedding.weight"].t());
}

/// (loss(p + h) - loss(p - h)) / 2h for one number of one parameter.
double numerical_slope(Gpt& model, const at::Tensor& tokens, const at::Tensor& parameter, std::int64_t index) {
    at::NoGradGuard no_grad;
    at::Tensor number = parameter.view({-1})[index];
    const double value = number.item<double>(), step = 1e-5;
    number.fill_(value + step);
    const double above = loss_on_tokens(model, tokens).item<double>();
    number.fill_(value - step);
    const double below = loss_on_tokens(model, tokens).item<double>();
    number.fill_(value);
    return (above - below) / (2 * step);
}

/// The names of all nodes of the tensor's autograd graph.
std::set<std::string> graph_of(const at::Tensor& tensor) {
    std::set<std::string> names;
    std::set<torch::autograd::Node*> seen;
    std::vector<torch::autograd::Node*> open = {tensor.grad_fn().get()};
    while (!open.empty()) {
        auto* node = open.back();
        open.pop_back();
        if (node == nullptr || !seen.insert(node).second) continue;
        names.insert(node->name());
        for (const auto& edge : node->next_edges()) open.push_back(edge.function.get());
    }
    return names;
}

bool has_node(const at::Tensor& tensor, const std::string& part) {
    for (const std::string& name : graph_of(tensor)) {
        if (name.find(part) != std::string::npos) return true;
    }
    return false;
}

}  // namespace

TEST(Gpt, GivesScoresForEveryTokenOfTheVocabulary) {
    Gpt model(toy);
    EXPECT_EQ(model->forward(random_tokens(toy, 3)).sizes(), at::IntArrayRef({3, 6, 11}));
    EXPECT_EQ(model->forward(at::zeros({1, 1}, at::kLong)).sizes(), at::IntArrayRef({1, 1, 11}));
}

TEST(Gpt, IsTheNetworkOfThePaperWithEitherNorm) {
    for (const GptNorm norm : {GptNorm::layer, GptNorm::rms}) {
        GptConfig config = toy;
        config.norm = norm;
        Gpt model = make_double(config);
        // Every parameter random and large: weights of 0.02 and biases of 0 would hide errors.
        for (auto& parameter : model->parameters()) parameter.data().add_(at::randn_like(parameter) * 0.5);
        const at::Tensor tokens = random_tokens(config, 3);
        for (const std::int64_t length : {1, 4, 6}) {
            const at::Tensor part = tokens.narrow(1, 0, length);
            // fp64, sums in another order through two layers.
            EXPECT_TRUE(at::allclose(model->forward(part), reference(model, config, part), 1e-11, 1e-11)) << length;
        }
    }
}

TEST(Gpt, WithRmsNormsIsInFp32ThatOfDouble) {
    GptConfig config = toy;
    config.norm = GptNorm::rms;
    Gpt model = make(config), exact = make_double(config);
    const at::Tensor tokens = random_tokens(config, 3);
    const auto gradients = [&](Gpt& of) {
        return torch::autograd::grad({loss_on_tokens(of, tokens)}, of->parameters());
    };
    EXPECT_TRUE(has_node(model->forward(tokens), "FusedBlock") && has_node(model->forward(tokens), "FusedRmsNorm"));
    const auto ours = gradients(model), expected = gradients(exact);
    for (std::size_t i = 0; i < ours.size(); ++i) {
        // fp32 through two blocks of four products each; the key's bias has a gradient of 0 but for rounding.
        EXPECT_LE(microbatch::test::relative_difference(ours[i], expected[i]), 2e-5) << i;
    }
}

TEST(Gpt, DependsOnlyOnEarlierTokens) {
    Gpt model(toy);
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

TEST(Gpt, GivesAPrefixTheSameScores) {
    Gpt model = make_double(toy);
    const at::Tensor tokens = random_tokens(toy, 2);
    // fp64; other shapes of the products may round otherwise.
    EXPECT_TRUE(
        at::allclose(model->forward(tokens.narrow(1, 0, 4)), model->forward(tokens).narrow(1, 0, 4), 1e-12, 1e-13));
}

TEST(Gpt, KnowsTheOrderOfTokens) {
    Gpt model = make_double(toy);
    const at::Tensor last =
        model->forward(microbatch::test::tensor_of({1, 2, 3, 4}, at::kLong).view({1, 4})).select(1, 3);
    const at::Tensor swapped =
        model->forward(microbatch::test::tensor_of({2, 1, 3, 4}, at::kLong).view({1, 4})).select(1, 3);
    EXPECT_GT((last - swapped).abs().max().item<double>(), 1e-9);  // a permutation of equal terms rounds at 1e-17
}

TEST(Gpt, HasOneParameterForEmbeddingAndHead) {
    Gpt model = make_double(toy);
    const auto parameters = model->named_parameters();
    int of_the_vocabulary = 0;
    std::set<const void*> storages;
    for (const auto& parameter : parameters) {
        of_the_vocabulary += parameter.value().size(0) == toy.vocabulary ? 1 : 0;
        storages.insert(parameter.value().storage().data());
    }
    EXPECT_EQ(of_the_vocabulary, 1);
    EXPECT_EQ(storages.size(), parameters.size());
    const at::Tensor tokens = microbatch::test::tensor_of({1, 2, 3}, at::kLong).view({1, 3});
    loss_on_tokens(model, tokens).backward();
    const at::Tensor weight = parameters["token_embedding.weight"];
    // Row 9 is no input: its gradient is the head's. Row 2 is input and score: the slope has both parts.
    for (const std::int64_t row : {9, 2}) {
        for (std::int64_t i = row * toy.width; i < (row + 1) * toy.width; ++i) {
            const double slope = numerical_slope(model, tokens, weight, i);
            EXPECT_NEAR(weight.grad().view({-1})[i].item<double>(), slope,
                        1e-7);  // central difference: h^2 and 1e-15/h
            EXPECT_NE(slope, 0);
        }
    }
}

TEST(Gpt, HasTheGradientOfItsLoss) {
    Gpt model = make_double(toy);
    const at::Tensor tokens = random_tokens(toy, 3);
    // Weights of 0.02 hide errors behind small gradients; these make attention sharp.
    for (auto& parameter : model->parameters()) parameter.data().add_(at::randn_like(parameter) * 0.5);
    loss_on_tokens(model, tokens).backward();
    for (const auto& parameter : model->named_parameters()) {
        for (int trial = 0; trial < 3; ++trial) {
            const std::int64_t index = at::randint(parameter.value().numel(), {1}, at::kLong).item<std::int64_t>();
            const double slope = numerical_slope(model, tokens, parameter.value(), index);
            const double gradient = parameter.value().grad().view({-1})[index].item<double>();
            // Central difference: an error of h^2 = 1e-10 times the third derivative, and 1e-15 * loss / h.
            EXPECT_NEAR(gradient, slope, 1e-6 * std::max(1.0, std::abs(slope))) << parameter.key() << ' ' << index;
        }
    }
}

TEST(Gpt, UsesTheFusedBlockAndWithDropoutAttentionOfLinearMemory) {
    for (const double dropout : {0.0, 0.1}) {
        GptConfig config = toy;
        config.dropout = dropout;
        Gpt model(config);
        const char* node = dropout == 0.0 ? "FusedBlock" : "CausalAttention";
        EXPECT_TRUE(has_node(model->forward(random_tokens(config, 2)), node)) << dropout;
    }
}

TEST(Gpt, IsTheSameForTheSameSeed) {
    const at::Tensor tokens = random_tokens(toy, 2);
    EXPECT_TRUE(at::equal(make_double(toy, 3)->forward(tokens), make_double(toy, 3)->forward(tokens)));
    EXPECT_FALSE(at::equal(make_double(toy, 3)->forward(tokens), make_double(toy, 4)->forward(tokens)));
}

TEST(Gpt, DropsInTrainingOnly) {
    GptConfig config = toy;
    config.dropout = 0.5;
    Gpt dropping = make_double(config), plain = make_double(toy);
    const at::Tensor tokens = random_tokens(toy, 2);
    const auto forward_with_seed = [&](std::uint64_t seed) {
        at::manual_seed(seed);
        return dropping->forward(tokens);
    };
    EXPECT_FALSE(at::equal(forward_with_seed(1), forward_with_seed(2)));
    EXPECT_TRUE(at::equal(forward_with_seed(1), forward_with_seed(1)));
    dropping->eval();
    EXPECT_TRUE(at::equal(dropping->forward(tokens), plain->forward(tokens)));
}

TEST(Gpt, DropsInTheEmbeddingAndBothBranches) {
    GptConfig config = toy;
    config.dropout = 0.5;
    const at::Tensor tokens = random_tokens(toy, 1);
    // Of the three places, only one is left in training mode each time.
    for (const char* place : {"", "blocks.0.attention.", "blocks.1.mlp."}) {
        Gpt model = make_double(config);
        model->eval();
        model->named_modules()[std::string(place) + "dropout"]->train();
        EXPECT_FALSE(at::equal(model->forward(tokens), model->forward(tokens))) << place;
    }
}

TEST(Gpt, DrawsNoRandomNumbersWithoutDropout) {
    Gpt model(toy);
    const at::Tensor tokens = random_tokens(toy, 2);
    at::manual_seed(5);
    model->forward(tokens);
    const at::Tensor after = at::randn({4});
    at::manual_seed(5);
    EXPECT_TRUE(at::equal(after, at::randn({4})));
}

TEST(Gpt, LearnsAFixedBatch) {
    at::manual_seed(1);
    GptConfig config = toy;
    config.width = 32;
    Gpt model(config);
    const at::Tensor tokens = random_tokens(config, 4);
    microbatch::test::expect_learns(
        *model, [&] { return loss_on_tokens(model, tokens) / 24; }, 0.5, 100);
}

TEST(Gpt, RefusesInvalidSamples) {
    Gpt model(toy);
    const auto expect_refused = [&](const at::Tensor& tokens, const std::string& part) {
        microbatch::test::expect_usage_error({part}, [&] { model->forward(tokens); });
    };
    expect_refused(at::zeros({1, 7}, at::kLong), "7 tokens, but the model accepts 1 to 6");
    expect_refused(at::zeros({1, 0}, at::kLong), "0 tokens, but the model accepts 1 to 6");
    expect_refused(at::zeros({6}, at::kLong), "Long of shape [6]");
    expect_refused(at::zeros({1, 6}, at::kByte), "Byte of shape [1, 6]");
    EXPECT_THROW(model->forward(at::full({1, 6}, 11, at::kLong)), c10::IndexError);
    EXPECT_THROW(model->forward(at::full({1, 6}, -1, at::kLong)), c10::IndexError);
}

TEST(Gpt, GivesItsScoresAsHiddenTimesHead) {
    Gpt model = make(toy);
    const at::Tensor tokens = random_tokens(toy, 2);
    const at::Tensor hidden = model->hidden(tokens);
    EXPECT_EQ(hidden.sizes(), at::IntArrayRef({2, 6, 8}));
    EXPECT_TRUE(at::equal(at::linear(hidden, model->head_weight()), model->forward(tokens)));
    EXPECT_TRUE(model->head_weight().is_same(model->named_parameters()["token_embedding.weight"]));
}
