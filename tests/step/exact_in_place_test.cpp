// Exact BatchNorm in models that change values in place.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "support/batch_norm.h"
#include "support/errors.h"

namespace microbatch {
namespace {

using namespace test;
using torch::nn::BatchNorm1d;
using torch::nn::Module;

TEST(ExactInPlace, AllowsChangesInPlace) {
    const auto build = [](Module& module) -> Forward {
        auto conv = add(module, "conv", conv1d(3, 4)), skip = add(module, "skip", conv1d(3, 4));
        auto a = add(module, "a", BatchNorm1d(4)), b = add(module, "b", BatchNorm1d(4));
        auto next = add(module, "next", conv1d(4, 4));
        return [=](const at::Tensor& x) mutable {
            at::Tensor y = a(conv(x)).relu_();
            at::Tensor z = b(next(y));
            z += skip(x);
            z.add_(y);
            return z.relu_();
        };
    };
    expect_exact(build, signals());
}

TEST(ExactInPlace, AllowsTheInputOfABarrierToBeChangedAfterwards) {
    const auto build = [](Module& module) -> Forward {
        auto conv = add(module, "conv", conv1d(3, 4));
        auto norm = add(module, "norm", BatchNorm1d(4));
        return [=](const at::Tensor& x) mutable {
            at::Tensor y = conv(x);
            const at::Tensor z = norm(y.clone());
            y.add_(z);
            return y;
        };
    };
    expect_exact(build, signals());
}

/// It is right, or refused by an error that has these words.
void expect_exact_or_refused(const Build& build, const Batch& batch, const std::vector<std::string>& words) {
    const Net native = make_net(build);
    const Left wanted = left_at_once(native, batch, loss_with(native));
    for (const bool recompute : {false, true}) {
        const Net net = make_net(build);
        const Plan plan{.micro_batch = 3, .recompute = recompute, .batch_norm = BatchNorm::exact};
        try {
            expect_left(left_by(net, batch, plan, loss_with(net)), wanted, exact_bar);
        } catch (const Error& error) {
            expect_usage_error(words, [&] { throw error; });
            expect_no_gradients(parameters_of(*net.module));
        }
    }
}

TEST(ExactInPlace, IsRightOrRefusesAChangeOfAViewInPlace) {
    const auto build = [](Module& module) -> Forward {
        ConvNorm a(module, "a", 3, 4), b(module, "b", 4, 4);
        return [=](const at::Tensor& x) mutable {
            at::Tensor y = a(x) * 2.0;
            y.select(1, 1).mul_(3.0);
            at::Tensor z = b(y) * 2.0;
            z.narrow(1, 0, 2).add_(y.narrow(1, 2, 2));
            return z * y;
        };
    };
    expect_exact_or_refused(build, signals(), {"aten::", "in place", "deferred"});
}

TEST(ExactInPlace, IsRightOrRefusesAChangeOfWhatABarrierPassed) {
    const auto build = [](Module& module) -> Forward {
        ConvNorm a(module, "a", 3, 4), b(module, "b", 4, 4);
        return [=](const at::Tensor& x) mutable {
            at::Tensor y = a(x) * 2.0;
            const at::Tensor view = y.view({y.size(0), 20});
            const at::Tensor z = b(y * 1.5);
            y.add_(z);
            return z + view.view_as(z);
        };
    };
    expect_exact_or_refused(build, signals(), {"aten::", "in place", "deferred"});
}

TEST(ExactInPlace, TakesABufferThatIsFilledPartByPart) {
    const auto build = [](Module& module) -> Forward {
        ConvNorm a(module, "a", 3, 2), b(module, "b", 4, 2);
        return [=](const at::Tensor& x) mutable {
            const at::Tensor part = a(x);
            const at::Tensor y = at::zeros({x.size(0), 4, x.size(2)}, x.options());
            y.narrow(1, 0, 2).copy_(part);
            y.narrow(1, 2, 2).add_(x.narrow(1, 0, 2));
            return b(y);
        };
    };
    expect_exact(build, signals());
}

TEST(ExactInPlace, IsRightOrRefusesABufferThatIsFilledAcrossABarrier) {
    const auto build = [](Module& module) -> Forward {
        ConvNorm a(module, "a", 3, 2), b(module, "b", 4, 2);
        return [=](const at::Tensor& x) mutable {
            const at::Tensor y = at::zeros({x.size(0), 4, x.size(2)}, x.options());
            const at::Tensor first = y.narrow(1, 0, 2);
            first.copy_(a(x));
            y.narrow(1, 2, 2).add_(x.narrow(1, 0, 2));
            return b(y);
        };
    };
    expect_exact_or_refused(build, signals(), {"aten::", "in place", "deferred"});
}

TEST(ExactInPlace, TakesNumbersThatTheModelMakes) {
    const auto build = [](Module& module) -> Forward {
        ConvNorm a(module, "a", 3, 4), b(module, "b", 4, 4);
        return [=](const at::Tensor& x) mutable {
            const at::Tensor scale = at::tensor({0.5, 2.0, 3.0, 4.0}, at::kDouble).view({1, 4, 1});
            at::Tensor shift = at::empty({4, 1}, at::kDouble);
            for (int i = 0; i < 4; ++i) shift.mutable_data_ptr<double>()[i] = i + 1.0;
            return b(a(x) * scale + shift) + shift * x.sum(1, true) + scale;
        };
    };
    expect_exact(build, signals());
}

TEST(ExactInPlace, TakesNumbersThatTheModelWritesInPlace) {
    const auto build = [](Module& module) -> Forward {
        ConvNorm a(module, "a", 3, 4), b(module, "b", 4, 4);
        return [=](const at::Tensor& x) mutable {
            const at::Tensor scale = at::zeros({4, 1}, x.options());
            for (int i = 0; i < 4; ++i) scale[i].fill_(i + 1.0);
            return b(a(x) * scale) + scale * x.sum(1, true);
        };
    };
    expect_exact(build, signals());
}

}  // namespace
}  // namespace microbatch
