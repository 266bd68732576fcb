// Models that are hard to cut at their BatchNorm layers: an exact batch leaves what plain torch leaves of it at once.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/container/sequential.h>

#include <optional>
#include <string>
#include <vector>

#include "microbatch/ops/cross_entropy.h"
#include "support/batch_norm.h"
#include "support/errors.h"
#include "support/tensors.h"

namespace microbatch {
namespace {

using namespace test;
using torch::nn::BatchNorm1d;
using torch::nn::BatchNorm1dOptions;
using torch::nn::BatchNorm2d;
using torch::nn::BatchNorm3d;
using torch::nn::Conv1d;
using torch::nn::Conv1dOptions;
using torch::nn::Conv2d;
using torch::nn::Conv3d;
using torch::nn::Linear;
using torch::nn::Module;

TEST(ExactHardCases, NormalisesVectors) {
    const auto build = [](Module& module) -> Forward {
        auto first = add(module, "first", Linear(3, 4));
        auto norm = add(module, "norm", BatchNorm1d(4));
        auto last = add(module, "last", Linear(4, 2));
        return [=](const at::Tensor& x) mutable { return last(at::tanh(norm(first(x)))); };
    };
    expect_exact(build, normed_batch({7, 3}), {3, 4, 5, 7});
    expect_exact(build, normed_batch({8, 3}), {2, 3, 4, 6});
}

TEST(ExactHardCases, NormalisesSignals) {
    const auto build = [](Module& module) -> Forward {
        ConvNorm first(module, "first", 3, 4), second(module, "second", 4, 2);
        return [=](const at::Tensor& x) mutable { return second(first(x)); };
    };
    expect_exact(build, signals(), {1, 2, 3, 4, 5, 6, 7, 50});
}

TEST(ExactHardCases, NormalisesVolumes) {
    const auto build = [](Module& module) -> Forward {
        auto conv = add(module, "conv", Conv3d(torch::nn::Conv3dOptions(2, 3, 2)));
        auto norm = add(module, "norm", BatchNorm3d(3));
        auto last = add(module, "last", Conv3d(torch::nn::Conv3dOptions(3, 2, 1).bias(false)));
        return [=](const at::Tensor& x) mutable { return last(at::relu(norm(conv(x)))); };
    };
    expect_exact(build, normed_batch({7, 2, 3, 4, 3}));
}

TEST(ExactHardCases, MayBeTheFirstLayer) {
    const auto build = [](Module& module) -> Forward {
        auto norm = add(module, "norm", BatchNorm1d(3));
        auto conv = add(module, "conv", conv1d(3, 2));
        return [=](const at::Tensor& x) mutable { return conv(norm(x)); };
    };
    expect_exact(build, signals());
}

TEST(ExactHardCases, MayBeTheLastLayer) {
    const auto build = [](Module& module) -> Forward {
        auto conv = add(module, "conv", conv1d(3, 2));
        auto norm = add(module, "norm", BatchNorm1d(2));
        return [=](const at::Tensor& x) mutable { return norm(conv(x)); };
    };
    expect_exact(build, signals());
}

TEST(ExactHardCases, MayBeTheOnlyLayer) {
    const auto build = [](Module& module) -> Forward {
        auto norm = add(module, "norm", BatchNorm1d(3));
        return [=](const at::Tensor& x) mutable { return norm(x); };
    };
    expect_exact(build, signals());
}

TEST(ExactHardCases, MayFollowAnother) {
    const auto build = [](Module& module) -> Forward {
        auto conv = add(module, "conv", conv1d(3, 4));
        auto a = add(module, "a", BatchNorm1d(4)), b = add(module, "b", BatchNorm1d(4));
        auto last = add(module, "last", conv1d(4, 2));
        return [=](const at::Tensor& x) mutable { return last(at::sin(b(a(conv(x))))); };
    };
    expect_exact(build, signals());
}

TEST(ExactHardCases, LetsBranchesPassSeveralLayers) {
    const auto build = [](Module& module) -> Forward {
        ConvNorm stem(module, "stem", 3, 4), a(module, "a", 4, 4), b(module, "b", 4, 4), c(module, "c", 4, 4);
        return [=](const at::Tensor& x) mutable {
            const at::Tensor s = stem(x);
            const at::Tensor one = a(s) + s, two = b(one) * s, three = c(two) + one + x.sum(1, true);
            return three + s * two;
        };
    };
    expect_exact(build, signals());
}

TEST(ExactHardCases, MayNormaliseTwoBranchesOfOneValue) {
    const auto build = [](Module& module) -> Forward {
        auto conv = add(module, "conv", conv1d(3, 4));
        auto a = add(module, "a", BatchNorm1d(4)), b = add(module, "b", BatchNorm1d(4));
        return [=](const at::Tensor& x) mutable {
            const at::Tensor y = conv(x);
            return at::sin(a(y)) * at::tanh(b(y)) + y.square();
        };
    };
    expect_exact(build, signals());
}

TEST(ExactHardCases, MayNormaliseWhatIsConcatenated) {
    const auto build = [](Module& module) -> Forward {
        std::vector<BatchNorm1d> norms;
        std::vector<Conv1d> convs;
        for (int i = 0; i < 3; ++i) {
            norms.push_back(add(module, "norm" + std::to_string(i), BatchNorm1d(3 + 2 * i)));
            convs.push_back(add(module, "conv" + std::to_string(i), conv1d(3 + 2 * i, 2)));
        }
        return [=](const at::Tensor& x) mutable {
            std::vector<at::Tensor> all{x};
            for (std::size_t i = 0; i < 3; ++i) all.push_back(convs[i](at::relu(norms[i](at::cat(all, 1)))));
            return at::cat(all, 1);
        };
    };
    expect_exact(build, signals());
}

TEST(ExactHardCases, MayUseALayerTwice) {
    const auto build = [](Module& module) -> Forward {
        auto first = add(module, "first", conv1d(3, 4)), second = add(module, "second", conv1d(4, 4));
        auto norm = add(module, "norm", BatchNorm1d(4));
        return [=](const at::Tensor& x) mutable { return norm(second(at::tanh(norm(first(x))))); };
    };
    Net net = make_net(build);
    expect_exact(build, signals());
}

TEST(ExactHardCases, MayUseAConvolutionTwice) {
    const auto build = [](Module& module) -> Forward {
        auto conv = add(module, "conv", conv1d(3, 3));
        auto a = add(module, "a", BatchNorm1d(3)), b = add(module, "b", BatchNorm1d(3));
        return [=](const at::Tensor& x) mutable { return at::tanh(b(conv(at::tanh(a(conv(x)))))); };
    };
    expect_exact(build, signals());
}

TEST(ExactHardCases, MayTieAWeightToItsTranspose) {
    const auto build = [](Module& module) -> Forward {
        auto linear = add(module, "linear", Linear(3, 4));
        auto a = add(module, "a", BatchNorm1d(4)), b = add(module, "b", BatchNorm1d(3));
        return [=](const at::Tensor& x) mutable {
            const at::Tensor hidden = at::tanh(a(linear(x)));
            return b(at::matmul(hidden, linear->weight));
        };
    };
    expect_exact(build, normed_batch({7, 3}), {3, 4, 7});
}

TEST(ExactHardCases, MayShareItsAffineParametersWithOtherLayers) {
    const auto build = [](Module& module) -> Forward {
        auto conv = add(module, "conv", conv1d(3, 4));
        auto norm = add(module, "norm", BatchNorm1d(4)), other = add(module, "other", BatchNorm1d(4));
        return [=](const at::Tensor& x) mutable {
            const at::Tensor y = at::batch_norm(at::tanh(norm(conv(x))), norm->weight, other->bias, other->running_mean,
                                                other->running_var, true, 0.1, 1e-5, false);
            return y * norm->weight.view({1, 4, 1});
        };
    };
    expect_exact(build, signals());
}

TEST(ExactHardCases, TakesResultsThatAreSeveral) {
    const auto build = [](Module& module) -> Forward {
        auto conv = add(module, "conv", conv1d(3, 6));
        auto a = add(module, "a", BatchNorm1d(2)), b = add(module, "b", BatchNorm1d(6));
        return [=](const at::Tensor& x) mutable {
            const at::Tensor y = b(conv(x));
            const std::vector<at::Tensor> two = y.split(2, 1), three = at::tanh(y).chunk(3, 1), one = y.unbind(2);
            const at::Tensor z = a(two[0] * three[2]) + two[1];
            const auto [values, places] = y.max(2);
            return z * one[3].unsqueeze(2).narrow(1, 0, 2) + values.unsqueeze(2).narrow(1, 1, 2) + three[0];
        };
    };
    expect_exact(build, signals());
}

TEST(ExactHardCases, TakesIndicesThatAreOptional) {
    const auto build = [](Module& module) -> Forward {
        ConvNorm a(module, "a", 3, 4), b(module, "b", 3, 2);
        return [=](const at::Tensor& x) mutable {
            using at::indexing::Slice;
            const at::Tensor channels = test::tensor_of({2, 0, 2}, at::kLong);
            const at::Tensor y = a(x), z = y.index({Slice(), channels});
            return b(z) + y.index({Slice(), channels.narrow(0, 0, 2)}) * z.index({Slice(), Slice(1, 3), Slice(4, 5)});
        };
    };
    expect_exact(build, signals());
}

TEST(ExactHardCases, TakesLayersWithoutParameters) {
    const auto build = [](Module& module) -> Forward {
        auto conv = add(module, "conv", conv1d(3, 4));
        auto a = add(module, "a", BatchNorm1d(BatchNorm1dOptions(4).affine(false)));
        auto b = add(module, "b", BatchNorm1d(BatchNorm1dOptions(4).track_running_stats(false)));
        auto c = add(module, "c", BatchNorm1d(BatchNorm1dOptions(4).affine(false).track_running_stats(false)));
        return [=](const at::Tensor& x) mutable { return c(at::sin(b(at::tanh(a(conv(x))))) + a(conv(x))); };
    };
    expect_exact(build, signals());
}

TEST(ExactHardCases, MovesTheStatisticsByAnyMomentum) {
    const auto build = [](Module& module) -> Forward {
        auto conv = add(module, "conv", conv1d(3, 4));
        auto a = add(module, "a", BatchNorm1d(BatchNorm1dOptions(4).momentum(std::nullopt)));
        auto b = add(module, "b", BatchNorm1d(BatchNorm1dOptions(4).momentum(0.0)));
        auto c = add(module, "c", BatchNorm1d(BatchNorm1dOptions(4).momentum(1.0)));
        return [=](const at::Tensor& x) mutable { return c(at::sin(b(at::tanh(a(conv(x)))))); };
    };
    expect_exact(build, signals());
}

TEST(ExactHardCases, AveragesOverStepsWithoutAMomentum) {
    const auto build = [](Module& module) -> Forward {
        auto norm = add(module, "norm", BatchNorm1d(BatchNorm1dOptions(3).momentum(std::nullopt)));
        auto conv = add(module, "conv", conv1d(3, 2));
        return [=](const at::Tensor& x) mutable { return conv(norm(x)); };
    };
    const Net native = make_net(build), net = make_net(build);
    for (std::uint64_t step = 0; step < 4; ++step) {
        const Batch batch = normed_batch({7, 3, 5}, at::kDouble, step);
        const Left wanted = left_at_once(native, batch, loss_with(native));
        const Plan plan{.micro_batch = 3, .batch_norm = BatchNorm::exact};
        expect_left(left_by(net, batch, plan, loss_with(net)), wanted, exact_bar);
    }
    EXPECT_EQ(net.module->named_buffers()["norm.num_batches_tracked"].item<std::int64_t>(), 4);
}

TEST(ExactHardCases, CountsOncePerCallAndStep) {
    const auto build = [](Module& module) -> Forward {
        ConvNorm a(module, "a", 3, 3);
        return [=](const at::Tensor& x) mutable { return a(a(x)); };
    };
    for (const bool recompute : {false, true}) {
        const Net net = make_net(build);
        Gatherer gatherer(*net.module);
        for (int step = 0; step < 3; ++step) {
            gatherer.gather(signals(), {.micro_batch = 2, .recompute = recompute, .batch_norm = BatchNorm::exact},
                            loss_with(net));
            gatherer.clear();
        }
        EXPECT_EQ(net.module->named_buffers()["a_norm.num_batches_tracked"].item<std::int64_t>(), 6);
    }
}

TEST(ExactHardCases, LeavesFrozenLayersWithoutAGradient) {
    for (const std::string frozen : {"a_conv", "a_norm", "b_conv", "b_norm", "a", "b", "conv"}) {
        const auto build = [&frozen](Module& module) -> Forward {
            ConvNorm a(module, "a", 3, 4), b(module, "b", 4, 4), c(module, "c", 4, 2);
            for (const auto& one : module.named_parameters()) {
                at::Tensor parameter = one.value();
                if (one.key().starts_with(frozen) || one.key().find("_" + frozen) != std::string::npos) {
                    parameter.requires_grad_(false);
                }
            }
            return [=](const at::Tensor& x) mutable { return c(b(a(x))); };
        };
        SCOPED_TRACE(frozen);
        expect_exact(build, signals(), {3, 7});
    }
}

TEST(ExactHardCases, LeavesLayersInEvaluationAlone) {
    const auto build = [](Module& module) -> Forward {
        ConvNorm a(module, "a", 3, 4), b(module, "b", 4, 4), c(module, "c", 4, 4);
        b.norm->eval();
        return [=](const at::Tensor& x) mutable { return c(b(a(x)) + x.mean(1, true)); };
    };
    expect_exact(build, signals());
}

TEST(ExactHardCases, TakesConvolutionsOfEveryKind) {
    const auto build = [](Module& module) -> Forward {
        using Options = torch::nn::Conv2dOptions;
        std::vector<Conv2d> convs{Conv2d(Options(4, 6, 3).groups(2).padding(1)),
                                  Conv2d(Options(6, 4, 3).dilation(2).padding(2).bias(false)),
                                  Conv2d(Options(4, 4, 3).padding(torch::kSame)),
                                  Conv2d(Options(4, 4, {3, 2}).padding(torch::kSame).dilation({1, 3})),
                                  Conv2d(Options(4, 4, 3).padding(1).padding_mode(torch::kCircular)),
                                  Conv2d(Options(4, 8, {1, 3}).stride({2, 1}).padding({0, 2}).groups(4)),
                                  Conv2d(Options(8, 4, 2).padding(torch::kValid))};
        std::vector<BatchNorm2d> norms;
        for (std::size_t i = 0; i < convs.size(); ++i) {
            add(module, "conv" + std::to_string(i), convs[i]);
            norms.push_back(add(module, "norm" + std::to_string(i), BatchNorm2d(convs[i]->options.out_channels())));
        }
        return [=](at::Tensor x) mutable {
            for (std::size_t i = 0; i < convs.size(); ++i) x = at::tanh(norms[i](convs[i](x)));
            return x;
        };
    };
    expect_exact(build, normed_batch({7, 4, 6, 5}));
}

TEST(ExactHardCases, TakesTransposedConvolutions) {
    const auto build = [](Module& module) -> Forward {
        auto up = add(module, "up", torch::nn::ConvTranspose1d(torch::nn::ConvTranspose1dOptions(3, 4, 3).stride(2)));
        auto norm = add(module, "norm", BatchNorm1d(4));
        auto down = add(module, "down", Conv1d(Conv1dOptions(4, 2, 3).stride(2)));
        return [=](const at::Tensor& x) mutable { return down(at::relu(norm(up(x)))); };
    };
    expect_exact(build, signals());
}

TEST(ExactHardCases, KeepsChannelsLast) {
    const auto build = [](Module& module) -> Forward {
        auto a = add(module, "a", conv2d(4, 6)), b = add(module, "b", conv2d(6, 2));
        auto norm = add(module, "norm", BatchNorm2d(6));
        return [=](const at::Tensor& x) mutable {
            const at::Tensor y = b(at::relu(norm(a(x.contiguous(at::MemoryFormat::ChannelsLast)))));
            return y.contiguous();
        };
    };
    expect_exact(build, normed_batch({7, 4, 6, 5}));
}

}  // namespace
}  // namespace microbatch
