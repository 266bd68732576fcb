// Exact BatchNorm of numbers that are not finite, and of bfloat16.
#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <gtest/gtest.h>

#include <limits>

#include "support/batch_norm.h"

namespace microbatch {
namespace {

using namespace test;
using torch::nn::Module;

TEST(ExactNumbers, ThatAreNotFiniteMakeTheGradientNaN) {
    const auto build = [](Module& module) -> Forward {
        Chain of(module);
        return [=](const at::Tensor& x) mutable {
            return of.third(at::tanh(of.b(of.second(at::sin(of.a(of.first(x)))))));
        };
    };
    using Limits = std::numeric_limits<double>;
    for (const double bad : {Limits::quiet_NaN(), Limits::infinity(), -Limits::infinity()}) {
        for (const std::int64_t place : {0, 4, 6}) {
            for (const bool recompute : {false, true}) {
                Batch batch = signals();
                batch.fields[0][place][1][2] = bad;
                const Net net = make_net(build);
                const Left left =
                    left_by(net, batch, {.micro_batch = 3, .recompute = recompute, .batch_norm = BatchNorm::exact},
                            loss_with(net));
                EXPECT_TRUE(std::isnan(left.loss));
                for (const Parameter& one : left.gradients) {
                    EXPECT_TRUE(at::isnan(one.tensor).any().item<bool>()) << one.name;
                }
            }
        }
    }
}

/// In this scope, autocast to bfloat16.
class Autocast {
public:
    Autocast() {
        at::autocast::set_autocast_enabled(at::kCPU, true);
        at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
    }
    Autocast(const Autocast&) = delete;
    Autocast& operator=(const Autocast&) = delete;
    ~Autocast() {
        at::autocast::set_autocast_enabled(at::kCPU, false);
        at::autocast::clear_cache();
    }
};

TEST(ExactNumbers, AreCloseWithAutocast) {
    const auto build = [](Module& module) -> Forward {
        Chain of(module);
        return [=](const at::Tensor& x) mutable {
            at::Tensor y;
            {
                const Autocast half;
                y = of.third(at::tanh(of.b(of.second(at::sin(of.a(of.first(x)))))));
            }
            return y.to(at::kFloat);
        };
    };
    const Batch batch = normed_batch({14, 3, 5}, at::kFloat);
    const Net native = make_net(build, at::kFloat);
    const Left wanted = left_at_once(native, batch, loss_with(native));
    for (const bool recompute : {false, true}) {
        const Net net = make_net(build, at::kFloat);
        const Left found = left_by(
            net, batch, {.micro_batch = 4, .recompute = recompute, .batch_norm = BatchNorm::exact}, loss_with(net));
        // bfloat16 rounds by 2e-3, in some ten layers forward and backward.
        EXPECT_LE(gradient_difference(found, wanted), 1e-2);
        EXPECT_NEAR(found.loss, wanted.loss, 1e-2);
    }
}

TEST(ExactNumbers, AreThoseOfTheOuterAutocast) {
    const auto build = [](Module& module) -> Forward {
        Chain of(module);
        return [=](const at::Tensor& x) mutable {
            const at::Tensor y = of.third(at::tanh(of.b(of.second(at::sin(of.a(of.first(x)))))));
            EXPECT_EQ(y.scalar_type(), at::kBFloat16);
            return y.to(at::kFloat);
        };
    };
    const Batch batch = normed_batch({14, 3, 5}, at::kFloat);
    const Net native = make_net(build, at::kFloat);
    const auto left = [&](const Net& net, const auto& call) {
        const Autocast half;
        return call(net);
    };
    const Left wanted = left(native, [&](const Net& net) { return left_at_once(net, batch, loss_with(net)); });
    for (const bool recompute : {false, true}) {
        const Plan plan{.micro_batch = 4, .recompute = recompute, .batch_norm = BatchNorm::exact};
        const Left found = left(make_net(build, at::kFloat),
                                [&](const Net& net) { return left_by(net, batch, plan, loss_with(net)); });
        EXPECT_LE(gradient_difference(found, wanted), 1e-2);
        EXPECT_NEAR(found.loss, wanted.loss, 1e-2);
    }
}

}  // namespace
}  // namespace microbatch
