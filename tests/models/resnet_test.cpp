#include "microbatch/models/resnet.h"

#include <gtest/gtest.h>

#include <cmath>
#include <utility>
#include <vector>

#include "microbatch/ops/cross_entropy.h"
#include "models/modules.h"
#include "support/errors.h"
#include "support/one_thread.h"

using microbatch::ImageNorm;
using microbatch::ResNet;
using microbatch::ResNetConfig;
using microbatch::test::count_numbers;
using microbatch::test::expect_usage_error;

namespace {

ResNetConfig small(ImageNorm norm) {
    return {.channels = 2, .classes = 3, .width = 8, .blocks = 1, .norm = norm};
}

/// The largest difference between a sample's scores alone and inside a batch of 4, in training mode.
double dependence_on_the_batch(ImageNorm norm) {
    at::manual_seed(1);
    ResNet model(small(norm));
    model->to(at::kDouble);
    const at::Tensor images = at::randn({4, 2, 9, 9}, at::kDouble);
    const at::Tensor together = model->forward(images);
    const at::Tensor alone = model->forward(images.narrow(0, 2, 1));
    return (together.narrow(0, 2, 1) - alone).abs().max().item<double>();
}

}  // namespace

TEST(ResNet, HasTheParametersOfThePaper) {
    // He et al. 2016, table 6: 0.27M for ResNet-20 and 0.85M for ResNet-56 (3 and 9 blocks a stage) on 3 channels.
    // Exactly 269,722 and 853,018 with the paper's shortcuts without parameters; the two projections and their norms
    // add 16 * 32 + 64 and 32 * 64 + 128.
    EXPECT_EQ(count_numbers(*ResNet(ResNetConfig{.channels = 3, .blocks = 3})), 272474);
    EXPECT_EQ(count_numbers(*ResNet(ResNetConfig{.channels = 3, .blocks = 9})), 855770);
    EXPECT_EQ(count_numbers(*ResNet(ResNetConfig{})), count_numbers(*ResNet(ResNetConfig{.norm = ImageNorm::group})));
}

TEST(ResNet, AcceptsImagesOfAnySize) {
    for (const ImageNorm norm : {ImageNorm::batch, ImageNorm::group, ImageNorm::rms}) {
        ResNet model(small(norm));
        for (const auto& [height, width] : {std::pair{28, 28}, {32, 32}, {33, 17}, {7, 5}, {1, 1}}) {
            const at::Tensor scores = model->forward(at::randn({2, 2, height, width}));
            EXPECT_EQ(scores.sizes(), at::IntArrayRef({2, 3}));
            EXPECT_TRUE(scores.isfinite().all().item<bool>());
        }
    }
}

TEST(ResNet, ReducesTheImageToAQuarter) {
    ResNet model(small(ImageNorm::group));
    at::Tensor features = at::randn({1, 2, 28, 28});
    for (const char* part : {"stem", "blocks"}) {
        features =
            std::dynamic_pointer_cast<torch::nn::SequentialImpl>(model->named_children()[part])->forward(features);
    }
    EXPECT_EQ(features.sizes(), at::IntArrayRef({1, 32, 7, 7}));
}

TEST(ResNet, PassesTheImageThroughUnchangedBlocksWhereTheResidualIsZero) {
    ResNet model(ResNetConfig{.width = 8, .blocks = 2, .norm = ImageNorm::group});
    const auto parameters = model->named_parameters();
    EXPECT_FALSE(parameters.contains("blocks.1.shortcut.conv1.weight"));
    EXPECT_EQ(parameters["blocks.2.shortcut.conv1.weight"].sizes(), at::IntArrayRef({16, 8, 1, 1}));
    const auto blocks = std::dynamic_pointer_cast<torch::nn::SequentialImpl>(model->named_children()["blocks"]);
    const at::Tensor x = at::rand({2, 8, 6, 6});  // not negative, so the last ReLU changes nothing
    at::NoGradGuard no_grad;
    parameters["blocks.1.residual.norm2.weight"].zero_();
    EXPECT_TRUE(at::equal((blocks->begin() + 1)->forward(x), x));
}

TEST(ResNet, TreatsASampleAloneAsInABatchWithGroupNormOnly) {
    EXPECT_LT(dependence_on_the_batch(ImageNorm::group), 1e-12);  // fp64 rounding of sums of some hundred terms
    EXPECT_GT(dependence_on_the_batch(ImageNorm::batch), 1e-2);
}

TEST(ResNet, UsesRunningStatisticsWhenEvaluating) {
    ResNet model(small(ImageNorm::batch));
    const at::Tensor images = at::randn({4, 2, 9, 9});
    const at::Tensor training = model->forward(images);
    model->eval();
    const at::Tensor evaluating = model->forward(images);
    EXPECT_FALSE(at::allclose(training, evaluating));
    // fp32; a batch of one may take another convolution algorithm.
    EXPECT_TRUE(at::allclose(model->forward(images.narrow(0, 1, 1)), evaluating.narrow(0, 1, 1), 1e-4, 1e-5));
}

TEST(ResNet, StartsWithConvolutionsOfVarianceTwoOverFanOut) {
    at::manual_seed(1);
    ResNet model(ResNetConfig{.width = 32});
    const at::Tensor weight = model->named_parameters()["blocks.4.residual.conv1.weight"];
    EXPECT_EQ(weight.sizes(), at::IntArrayRef({128, 64, 3, 3}));
    const double expected = std::sqrt(2.0 / (128 * 9));
    // 73,728 numbers: the estimate's own deviation is 0.3 %.
    EXPECT_NEAR(weight.std().item<double>(), expected, 0.01 * expected);
}

TEST(ResNet, IsTheSameForTheSameSeed) {
    const auto scores = [](std::uint64_t seed) {
        at::manual_seed(seed);
        return ResNet(small(ImageNorm::batch))->forward(at::ones({2, 2, 8, 8}) * at::arange(128).view({2, 1, 8, 8}));
    };
    EXPECT_TRUE(at::equal(scores(3), scores(3)));
    EXPECT_FALSE(at::equal(scores(3), scores(4)));
}

TEST(ResNet, LearnsAFixedBatch) {
    for (const ImageNorm norm : {ImageNorm::batch, ImageNorm::group, ImageNorm::rms}) {
        SCOPED_TRACE(to_string(norm));
        at::manual_seed(1);
        ResNet model(small(norm));
        const at::Tensor images = at::randn({8, 2, 8, 8}), targets = at::randint(0, 3, {8}, at::kLong);
        const auto loss = [&] { return microbatch::cross_entropy_sum(model->forward(images), targets) / 8; };
        microbatch::test::expect_learns(*model, loss, 0.1, 30);
    }
}

TEST(ResNet, HasTheSameBitsWhenItRecomputes) {
    const auto train = [](ImageNorm norm, bool on) {
        at::manual_seed(1);
        ResNet model(small(norm));
        model->set_recompute(on);
        EXPECT_EQ(model->recomputes(), on);
        std::vector<at::Tensor> all;
        for (int micro_batch = 0; micro_batch < 3; ++micro_batch) {
            const at::Tensor images = at::randn({4, 2, 8, 8}), targets = at::randint(0, 3, {4}, at::kLong);
            const at::Tensor loss = microbatch::cross_entropy_sum(model->forward(images), targets);
            loss.backward();
            all.push_back(loss.detach());
        }
        for (const at::Tensor& parameter : model->parameters()) all.push_back(parameter.grad());
        for (const at::Tensor& buffer : model->buffers()) all.push_back(buffer);
        return all;
    };
    for (const ImageNorm norm : {ImageNorm::batch, ImageNorm::group, ImageNorm::rms}) {
        const auto plain = train(norm, false), recomputed = train(norm, true);
        for (std::size_t i = 0; i < plain.size(); ++i) {
            EXPECT_TRUE(at::equal(recomputed[i], plain[i])) << to_string(norm) << ' ' << i;
        }
    }
}

TEST(ResNet, NamesTheSettingThatIsWrong) {
    expect_usage_error({"resnet: channels is 0"}, [] { ResNet(ResNetConfig{.channels = 0}); });
    expect_usage_error({"resnet: classes is -1"}, [] { ResNet(ResNetConfig{.classes = -1}); });
    expect_usage_error({"resnet: width is 0"}, [] { ResNet(ResNetConfig{.width = 0}); });
    expect_usage_error({"resnet: blocks is 0"}, [] { ResNet(ResNetConfig{.blocks = 0}); });
    expect_usage_error({"resnet: width is 92233720"}, [] { ResNet(ResNetConfig{.width = INT64_MAX}); });
    expect_usage_error({"width 12 is not a multiple of the 8 groups"},
                       [] { ResNet(ResNetConfig{.width = 12, .norm = ImageNorm::group}); });
    EXPECT_NO_THROW(ResNet(ResNetConfig{.width = 12}));
}

TEST(ResNet, RefusesImagesOfAnotherShape) {
    ResNet model(small(ImageNorm::group));
    expect_usage_error({"[4, 3, 8, 8]"}, [&] { model->forward(at::randn({4, 3, 8, 8})); });
    expect_usage_error({"give [samples, 2, height, width]"}, [&] { model->forward(at::randn({2, 8, 8})); });
}

TEST(ImageNorm, GoesToTextAndBack) {
    for (const ImageNorm norm : {ImageNorm::batch, ImageNorm::group, ImageNorm::rms}) {
        EXPECT_EQ(microbatch::parse_image_norm(microbatch::to_string(norm)), norm);
    }
    EXPECT_EQ(microbatch::to_string(ImageNorm::group), "group");
    expect_usage_error({"\"Batch\"; choose batch, group or rms"}, [] { microbatch::parse_image_norm("Batch"); });
}
