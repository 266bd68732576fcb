#include "microbatch/models/mlp.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "microbatch/nn/cross_entropy.h"
#include "models/helpers.h"

using microbatch::Mlp;
using microbatch::MlpConfig;

namespace {

std::int64_t parameters_of(const Mlp& model) {
    std::int64_t sum = 0;
    for (const auto& parameter : model->parameters()) sum += parameter.numel();
    return sum;
}

}  // namespace

TEST(Mlp, HasTheParametersOfItsLayers) {
    // 784*256+256, 256*256+256, 256*10+10 by hand.
    EXPECT_EQ(parameters_of(Mlp(MlpConfig{})), 200960 + 65792 + 2570);
    EXPECT_EQ(parameters_of(Mlp(MlpConfig{.inputs = 5, .layers = 1, .width = 3, .classes = 2})), 18 + 8);
}

TEST(Mlp, IsLinearReluLinear) {
    at::manual_seed(1);
    Mlp model(MlpConfig{.inputs = 6, .layers = 1, .width = 4, .classes = 3});
    model->to(at::kDouble);
    const auto p = model->parameters();
    const at::Tensor x = at::randn({5, 6}, at::kDouble);
    const at::Tensor expected = at::relu(x.matmul(p[0].t()) + p[1]).matmul(p[2].t()) + p[3];
    EXPECT_TRUE(at::allclose(model->forward(x), expected, 1e-14, 1e-14));  // fp64; the products may be fused
}

TEST(Mlp, FlattensImages) {
    Mlp model(MlpConfig{});
    const at::Tensor images = at::randn({3, 1, 28, 28});
    EXPECT_EQ(model->forward(images).sizes(), at::IntArrayRef({3, 10}));
    EXPECT_TRUE(at::equal(model->forward(images), model->forward(images.flatten(1))));
}

TEST(Mlp, IsTheSameForTheSameSeed) {
    const auto first_weight = [](std::uint64_t seed) {
        at::manual_seed(seed);
        return Mlp(MlpConfig{})->parameters()[0];
    };
    EXPECT_TRUE(at::equal(first_weight(3), first_weight(3)));
    EXPECT_FALSE(at::equal(first_weight(3), first_weight(4)));
}

TEST(Mlp, LearnsAFixedBatch) {
    at::manual_seed(1);
    Mlp model(MlpConfig{.inputs = 8, .layers = 2, .width = 32, .classes = 4});
    const at::Tensor x = at::randn({16, 8}), targets = at::randint(0, 4, {16}, at::kLong);
    const auto loss = [&] { return microbatch::cross_entropy_sum(model->forward(x), targets) / 16; };
    const double before = loss().item<double>();
    for (int step = 0; step < 50; ++step) {
        model->zero_grad();
        loss().backward();
        at::NoGradGuard no_grad;
        for (auto& parameter : model->parameters()) parameter.sub_(0.5 * parameter.grad());
    }
    EXPECT_LT(loss().item<double>(), before / 2);
}

TEST(Mlp, NamesTheSettingThatIsWrong) {
    expect_contains(usage_message([] { Mlp(MlpConfig{.inputs = 0}); }), "mlp: inputs is 0");
    expect_contains(usage_message([] { Mlp(MlpConfig{.layers = 0}); }), "mlp: layers is 0");
    expect_contains(usage_message([] { Mlp(MlpConfig{.width = -4}); }), "mlp: width is -4");
    expect_contains(usage_message([] { Mlp(MlpConfig{.classes = 0}); }), "mlp: classes is 0");
    expect_contains(usage_message([] { Mlp(MlpConfig{.width = INT64_MAX}); }), "mlp: width is 9223372036854775807");
}

TEST(Mlp, RefusesSamplesOfAnotherSize) {
    Mlp model(MlpConfig{.inputs = 6});
    for (const auto& shape : std::vector<std::vector<std::int64_t>>{{2, 5}, {6}, {2, 6, 2}, {}}) {
        expect_contains(usage_message([&] { model->forward(at::randn(shape)); }), "6 numbers each");
    }
    expect_contains(usage_message([&] { model->forward(at::randn({2, 5})); }), "[2, 5]");
    EXPECT_EQ(model->forward(at::randn({0, 6})).sizes(), at::IntArrayRef({0, 10}));
}
