// Exact BatchNorm in models of which a part has no gradient.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "support/batch_norm.h"

namespace microbatch {
namespace {

using namespace test;
using torch::nn::Module;

TEST(ExactGradients, StopWhereTheModelDetaches) {
    const auto build = [](Module& module) -> Forward {
        Chain of(module);
        return [=](const at::Tensor& x) mutable {
            const at::Tensor y = at::tanh(of.a(of.first(x)));
            const at::Tensor z = of.second(y.detach()) * y.detach().sum(1, true) + y;
            return of.third(at::tanh(of.b(z)) * z.detach());
        };
    };
    expect_exact(build, signals());
}

TEST(ExactGradients, DoNotPassABarrierWhoseInputIsDetached) {
    const auto build = [](Module& module) -> Forward {
        Chain of(module);
        return [=](const at::Tensor& x) mutable {
            const at::Tensor y = of.first(x);
            return of.third(at::tanh(of.b(of.second(at::sin(of.a(y.detach())))))) + y.narrow(1, 0, 2);
        };
    };
    expect_exact(build, signals());
}

TEST(ExactGradients, DoNotPassABarrierWhoseOutputIsDetached) {
    const auto build = [](Module& module) -> Forward {
        Chain of(module);
        return [=](const at::Tensor& x) mutable {
            const at::Tensor y = of.first(x);
            return of.third(at::tanh(of.b(of.second(at::sin(of.a(y).detach())))));
        };
    };
    expect_exact(build, signals());
}

TEST(ExactGradients, LeaveOutWhatRunsWithoutAGraph) {
    const auto build = [](Module& module) -> Forward {
        Chain of(module);
        return [=](const at::Tensor& x) mutable {
            at::Tensor y = of.first(x), gate;
            {
                const at::NoGradGuard no_grad;
                gate = at::sigmoid(of.second(at::tanh(y)));
            }
            return of.third(at::tanh(of.b(at::sin(of.a(y)) * gate)));
        };
    };
    expect_exact(build, signals());
}

TEST(ExactGradients, LeaveOutABatchNormThatRunsWithoutAGraph) {
    const auto build = [](Module& module) -> Forward {
        Chain of(module);
        return [=](const at::Tensor& x) mutable {
            at::Tensor y = of.first(x), gate;
            {
                const at::NoGradGuard no_grad;
                gate = at::sigmoid(of.a(at::tanh(y)));
            }
            return of.third(at::tanh(of.b(y * gate)));
        };
    };
    expect_exact(build, signals());
}

TEST(ExactGradients, LeaveTheFirstPartOfAModelWithoutAGraph) {
    const auto build = [](Module& module) -> Forward {
        Chain of(module);
        return [=](const at::Tensor& x) mutable {
            at::Tensor y;
            {
                const at::NoGradGuard no_grad;
                y = at::tanh(of.a(of.first(x)));
            }
            return of.third(at::tanh(of.b(of.second(y))));
        };
    };
    expect_exact(build, signals());
}

}  // namespace
}  // namespace microbatch
