#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>

#include "microbatch/models/gpt.h"
#include "microbatch/ops/cross_entropy.h"
#include "models/modules.h"
#include "support/errors.h"
#include "support/one_thread.h"

using microbatch::count_parameters;
using microbatch::ErrorKind;
using microbatch::Gpt;
using microbatch::gpt_preset;
using microbatch::GptConfig;
using microbatch::GptNorm;
using microbatch::parse_gpt_norm;
using microbatch::test::count_numbers;
using microbatch::test::error_message;
using microbatch::test::expect_usage_error;

namespace {

const GptConfig toy = {.layers = 2, .heads = 2, .width = 8, .length = 6, .vocabulary = 11};

}  // namespace

TEST(GptConfig, CountsTheParametersOfItsPresets) {
    EXPECT_EQ(count_parameters(gpt_preset("gpt-tiny")), 834304);     // 4 (12 w^2 + 13 w) + (256 + 64 + 2) w by hand
    EXPECT_EQ(count_parameters(gpt_preset("gpt-small")), 10844160);  // 6 (12 w^2 + 13 w) + (256 + 256 + 2) w by hand
    EXPECT_EQ(count_parameters(gpt_preset("gpt2")), 124439808);      // of the published GPT-2 weights
}

TEST(GptConfig, CountsTheParametersThatItHas) {
    for (const GptConfig& config :
         {toy, gpt_preset("gpt-tiny"), GptConfig{1, 3, 15, 1, 2, 0.5}, GptConfig{1, 1, 1, 1, 1},
          GptConfig{5, 2, 6, 33, 7}, GptConfig{2, 2, 6, 5, 7, 0, GptNorm::rms}}) {
        EXPECT_EQ(count_parameters(config), count_numbers(*Gpt(config)));
    }
}

TEST(GptConfig, HasTheSizesOfItsPresets) {
    const GptConfig gpt2 = gpt_preset("gpt2");
    EXPECT_EQ(gpt2.heads, 12);
    EXPECT_EQ(gpt2.length, 1024);
    EXPECT_EQ(gpt_preset("gpt-small").heads, 6);
    EXPECT_EQ(gpt_preset("gpt-small").length, 256);
    EXPECT_EQ(gpt_preset("gpt-tiny").heads, 4);
    EXPECT_EQ(gpt_preset("gpt-tiny").dropout, 0);
    expect_usage_error({"\"gpt3\"; choose gpt-tiny, gpt-small or gpt2"}, [] { gpt_preset("gpt3"); });
}

TEST(GptConfig, HasNoShiftsInRmsNorms) {
    GptConfig config = toy;
    config.norm = parse_gpt_norm("rms");
    const auto parameters = Gpt(config)->named_parameters();
    for (const char* norm : {"blocks.0.attention_norm", "blocks.1.mlp_norm", "norm"}) {
        EXPECT_TRUE(parameters.contains(std::string(norm) + ".weight")) << norm;
        EXPECT_FALSE(parameters.contains(std::string(norm) + ".bias")) << norm;
    }
    EXPECT_EQ(to_string(parse_gpt_norm("layer")), "layer");
    expect_usage_error({"\"group\" is not a norm of a gpt; choose layer or rms"}, [] { parse_gpt_norm("group"); });
}

TEST(GptConfig, NamesItsParametersByPlace) {
    const auto parameters = Gpt(toy)->named_parameters();
    EXPECT_EQ(parameters["blocks.0.attention.qkv.weight"].sizes(), at::IntArrayRef({24, 8}));
    EXPECT_EQ(parameters["blocks.1.mlp.expansion.bias"].sizes(), at::IntArrayRef({32}));
    EXPECT_EQ(parameters["position_embedding.weight"].sizes(), at::IntArrayRef({6, 8}));
}

TEST(GptConfig, StartsAsGpt2Does) {
    at::manual_seed(1);
    Gpt model(GptConfig{.layers = 8, .heads = 4, .width = 128});
    for (const auto& parameter : model->named_parameters()) {
        const std::string& name = parameter.key();
        const at::Tensor& value = parameter.value();
        if (name.find("bias") != std::string::npos) {
            EXPECT_TRUE(value.eq(0).all().item<bool>()) << name;
        } else if (name.find("norm") != std::string::npos) {
            EXPECT_TRUE(value.eq(1).all().item<bool>()) << name;
        } else {
            const double expected = name.find("projection") != std::string::npos ? 0.02 / 4 : 0.02;  // sqrt(2 * 8) = 4
            // At least 8192 numbers: the estimate's own deviation is below 0.8 %.
            EXPECT_NEAR(value.std().item<double>(), expected, 0.04 * expected) << name;
        }
    }
    const at::Tensor tokens = at::randint(0, 256, {2, 64}, at::kLong);
    const double loss = microbatch::cross_entropy_sum(model->forward(tokens), tokens.roll(-1, 1)).item<double>() / 128;
    EXPECT_NEAR(loss, std::log(256.0), 0.1);  // nearly equal scores: the logarithm of the vocabulary
}

TEST(GptConfig, NamesTheSettingThatIsWrong) {
    const auto expect_refused = [](const GptConfig& config, const std::string& part) {
        const auto count = [&] { count_parameters(config); };
        const auto make = [&] { Gpt{config}; };
        expect_usage_error({part}, count);
        EXPECT_EQ(error_message(ErrorKind::usage, make), error_message(ErrorKind::usage, count));
    };
    expect_refused({.layers = 0}, "gpt: layers is 0");
    expect_refused({.heads = -1}, "gpt: heads is -1");
    expect_refused({.width = 0}, "gpt: width is 0");
    expect_refused({.length = 0}, "gpt: length is 0");
    expect_refused({.vocabulary = 0}, "gpt: vocabulary is 0");
    expect_refused({.vocabulary = INT64_MAX}, "gpt: vocabulary is 9223372036854775807");
    expect_refused({.heads = 5, .width = 128}, "width 128 is not a multiple of heads 5");
    expect_refused({.dropout = 1}, "dropout is 1");
    expect_refused({.dropout = -0.1}, "dropout is -0.1");
    expect_refused({.dropout = std::numeric_limits<double>::quiet_NaN()}, "dropout is nan");
    expect_refused({.layers = 2000000000, .heads = 1, .width = 2000000000}, "width 2000000000 is too large");
}
