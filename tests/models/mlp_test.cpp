#include "microbatch/models/mlp.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "microbatch/ops/cross_entropy.h"
#include "models/modules.h"
#include "support/errors.h"
#include "support/one_thread.h"

using microbatch::Mlp;
using microbatch::MlpConfig;
using microbatch::test::count_numbers;
using microbatch::test::expect_usage_error;

TEST(Mlp, HasTheParametersOfItsLayers) {
    // 784*256+256, 256*256+256, 256*10+10 by hand.
    EXPECT_EQ(count_numbers(*Mlp(MlpConfig{})), 200960 + 65792 + 2570);
    EXPECT_EQ(count_numbers(*Mlp(MlpConfig{.inputs = 5, .layers = 1, .width = 3, .classes = 2})), 18 + 8);
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
    microbatch::test::expect_learns(*model, loss, 0.5, 50);
}

TEST(Mlp, NamesTheSettingThatIsWrong) {
    expect_usage_error({"mlp: inputs is 0"}, [] { Mlp(MlpConfig{.inputs = 0}); });
    expect_usage_error({"mlp: layers is 0"}, [] { Mlp(MlpConfig{.layers = 0}); });
    expect_usage_error({"mlp: width is -4"}, [] { Mlp(MlpConfig{.width = -4}); });
    expect_usage_error({"mlp: classes is 0"}, [] { Mlp(MlpConfig{.classes = 0}); });
    expect_usage_error({"mlp: width is 9223372036854775807"}, [] { Mlp(MlpConfig{.width = INT64_MAX}); });
}

TEST(Mlp, RefusesSamplesOfAnotherSize) {
    Mlp model(MlpConfig{.inputs = 6});
    for (const auto& shape : std::vector<std::vector<std::int64_t>>{{2, 5}, {6}, {2, 6, 2}, {}}) {
        expect_usage_error({"6 numbers each"}, [&] { model->forward(at::randn(shape)); });
    }
    expect_usage_error({"[2, 5]"}, [&] { model->forward(at::randn({2, 5})); });
    EXPECT_EQ(model->forward(at::randn({0, 6})).sizes(), at::IntArrayRef({0, 10}));
}
