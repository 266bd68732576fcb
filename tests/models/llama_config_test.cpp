#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <string>

#include "microbatch/models/llama.h"
#include "microbatch/ops/cross_entropy.h"
#include "models/modules.h"
#include "support/errors.h"
#include "support/one_thread.h"

using microbatch::count_parameters;
using microbatch::ErrorKind;
using microbatch::inner_width;
using microbatch::Llama;
using microbatch::llama_preset;
using microbatch::LlamaConfig;
using microbatch::test::count_numbers;
using microbatch::test::error_message;
using microbatch::test::expect_usage_error;

namespace {

const LlamaConfig toy = {
    .layers = 2, .heads = 4, .kv_heads = 2, .width = 16, .inner = 20, .length = 6, .vocabulary = 11};

}  // namespace

TEST(LlamaConfig, CountsTheParametersOfItsPresets) {
    // layers w (2 w + 2 kv + 3 inner + 2) + (vocabulary + 1) w by hand.
    EXPECT_EQ(count_parameters(llama_preset("llama-1m")), 955776);
    EXPECT_EQ(count_parameters(llama_preset("llama-15m")), 14703744);
    EXPECT_EQ(count_parameters(llama_preset("llama-110m")), 112678656);
}

TEST(LlamaConfig, CountsTheParametersThatItHas) {
    for (const LlamaConfig& config :
         {toy, llama_preset("llama-1m"), LlamaConfig{1, 3, 1, 30, 7, 1, 2}, LlamaConfig{1, 1, 1, 2, 1, 1, 1},
          LlamaConfig{.layers = 3, .heads = 2, .kv_heads = 2, .width = 12}}) {
        EXPECT_EQ(count_parameters(config), count_numbers(*Llama(config)));
    }
}

TEST(LlamaConfig, HasTheSizesOfItsPresets) {
    const LlamaConfig large = llama_preset("llama-110m");
    EXPECT_EQ(large.length, 1024);
    EXPECT_EQ(large.vocabulary, 32000);
    EXPECT_EQ(llama_preset("llama-15m").length, 256);
    expect_usage_error({"\"llama\"; choose llama-1m, llama-15m or llama-110m"}, [] { llama_preset("llama"); });
}

TEST(LlamaConfig, HasAnMlpOfEightThirdsOfItsWidthInMultiplesOf32) {
    EXPECT_EQ(inner_width({.width = 768}), 2048);
    EXPECT_EQ(inner_width({.width = 128}), 352);  // 341.3
    EXPECT_EQ(inner_width({.width = 12}), 32);
    EXPECT_EQ(inner_width({.width = 13}), 64);  // 34.7
    EXPECT_EQ(inner_width({.width = 128, .inner = 5}), 5);
}

TEST(LlamaConfig, NamesItsParametersAsHuggingFaceDoes) {
    const auto parameters = Llama(toy)->named_parameters();
    EXPECT_EQ(parameters.size(), 2 + 2 * 9);
    EXPECT_EQ(parameters["model.embed_tokens.weight"].sizes(), at::IntArrayRef({11, 16}));
    EXPECT_EQ(parameters["model.norm.weight"].sizes(), at::IntArrayRef({16}));
    const std::string block = "model.layers.1.";
    EXPECT_EQ(parameters[block + "input_layernorm.weight"].sizes(), at::IntArrayRef({16}));
    EXPECT_EQ(parameters[block + "post_attention_layernorm.weight"].sizes(), at::IntArrayRef({16}));
    EXPECT_EQ(parameters[block + "self_attn.q_proj.weight"].sizes(), at::IntArrayRef({16, 16}));
    EXPECT_EQ(parameters[block + "self_attn.k_proj.weight"].sizes(), at::IntArrayRef({8, 16}));
    EXPECT_EQ(parameters[block + "self_attn.v_proj.weight"].sizes(), at::IntArrayRef({8, 16}));
    EXPECT_EQ(parameters[block + "self_attn.o_proj.weight"].sizes(), at::IntArrayRef({16, 16}));
    EXPECT_EQ(parameters[block + "mlp.gate_proj.weight"].sizes(), at::IntArrayRef({20, 16}));
    EXPECT_EQ(parameters[block + "mlp.up_proj.weight"].sizes(), at::IntArrayRef({20, 16}));
    EXPECT_EQ(parameters[block + "mlp.down_proj.weight"].sizes(), at::IntArrayRef({16, 20}));
    EXPECT_EQ(Llama(toy)->buffers().size(), 0U);
}

TEST(LlamaConfig, StartsAsTheGptDoes) {
    at::manual_seed(1);
    Llama model(LlamaConfig{.layers = 8});
    for (const auto& parameter : model->named_parameters()) {
        const std::string& name = parameter.key();
        const at::Tensor& value = parameter.value();
        if (name.find("norm") != std::string::npos) {
            EXPECT_TRUE(value.eq(1).all().item<bool>()) << name;
        } else {
            const bool projects = name.find("o_proj") != std::string::npos || name.find("down") != std::string::npos;
            const double expected = projects ? 0.02 / 4 : 0.02;  // sqrt(2 * 8) = 4
            // At least 8192 numbers: the estimate's own deviation is below 0.8 %.
            EXPECT_NEAR(value.std().item<double>(), expected, 0.04 * expected) << name;
        }
    }
    const at::Tensor tokens = at::randint(0, 256, {2, 64}, at::kLong);
    const double loss = microbatch::cross_entropy_sum(model->forward(tokens), tokens.roll(-1, 1)).item<double>() / 128;
    EXPECT_NEAR(loss, std::log(256.0), 0.1);  // nearly equal scores: the logarithm of the vocabulary
}

TEST(LlamaConfig, NamesTheSettingThatIsWrong) {
    const auto expect_refused = [](const LlamaConfig& config, const std::string& part) {
        const auto count = [&] { count_parameters(config); };
        const auto make = [&] { Llama{config}; };
        expect_usage_error({part}, count);
        EXPECT_EQ(error_message(ErrorKind::usage, make), error_message(ErrorKind::usage, count));
    };
    expect_refused({.layers = 0}, "llama: layers is 0");
    expect_refused({.heads = -1}, "llama: heads is -1");
    expect_refused({.kv_heads = 0}, "llama: kv_heads is 0");
    expect_refused({.width = 0}, "llama: width is 0");
    expect_refused({.inner = -1}, "llama: inner is -1");
    expect_refused({.length = 0}, "llama: length is 0");
    expect_refused({.vocabulary = INT64_MAX}, "llama: vocabulary is 9223372036854775807");
    expect_refused({.heads = 6}, "width 128 is not a multiple of heads 6");
    expect_refused({.kv_heads = 3}, "heads 4 is not a multiple of kv_heads 3");
    expect_refused({.kv_heads = 8}, "heads 4 is not a multiple of kv_heads 8");
    expect_refused({.width = 12}, "a head has 3 numbers (width 12 / heads 4)");
    expect_refused({.layers = 2000000000, .heads = 1, .kv_heads = 1, .width = 700000000}, "width 700000000 is too");
    // The MLP would be wider than 2^31.
    expect_refused({.width = 2000000000}, "llama: inner is 5333333344");
    expect_refused({.width = INT64_MAX}, "llama: width is 9223372036854775807");
}
