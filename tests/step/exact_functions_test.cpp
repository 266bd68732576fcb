// Exact BatchNorm in models with parts that bring their own gradient, have none, or draw random numbers.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/custom_function.h>

#include "microbatch/autograd/recompute.h"
#include "microbatch/ops/cross_entropy.h"
#include "microbatch/ops/gelu.h"
#include "microbatch/ops/linear_cross_entropy.h"
#include "support/batch_norm.h"
#include "support/errors.h"
#include "support/tensors.h"

namespace microbatch {
namespace {

using namespace test;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;
using torch::nn::BatchNorm1d;
using torch::nn::Module;

/// Both the square and the cube of its inputs' product.
struct Powers : Function<Powers> {
    static variable_list forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& y) {
        context->save_for_backward({x, y});
        const at::Tensor product = x * y;
        return {product.square(), product.pow(3)};
    }

    static variable_list backward(AutogradContext* context, variable_list gradients) {
        const variable_list saved = context->get_saved_variables();
        const at::Tensor product = saved[0] * saved[1];
        at::Tensor all = at::zeros_like(product);
        if (gradients[0].defined()) all = all + gradients[0] * 2.0 * product;
        if (gradients[1].defined()) all = all + gradients[1] * 3.0 * product.square();
        return {all * saved[1], all * saved[0]};
    }
};

/// Its gradient is not that of what it computes.
struct Tripled : Function<Tripled> {
    static at::Tensor forward(AutogradContext*, const at::Tensor& x) { return x.clone(); }
    static variable_list backward(AutogradContext*, variable_list gradients) { return {gradients[0] * 3.0}; }
};

TEST(ExactFunctions, OfTheirOwnGradientMayComeBeforeABarrier) {
    const auto build = [](Module& module) -> Forward {
        Chain of(module);
        return [=](const at::Tensor& x) mutable {
            return of.third(at::tanh(of.b(of.second(at::tanh(of.a(Tripled::apply(of.first(x))))))));
        };
    };
    expect_exact(build, signals());
}

TEST(ExactFunctions, OfTheirOwnGradientMayComeBetweenBarriers) {
    const auto build = [](Module& module) -> Forward {
        Chain of(module);
        return [=](const at::Tensor& x) mutable {
            const at::Tensor y = at::sin(of.a(of.first(x)));
            return of.third(at::tanh(of.b(of.second(Tripled::apply(y) + y))));
        };
    };
    expect_exact(build, signals());
}

TEST(ExactFunctions, OfTheirOwnGradientMayComeAfterTheLastBarrier) {
    const auto build = [](Module& module) -> Forward {
        Chain of(module);
        return [=](const at::Tensor& x) mutable {
            const at::Tensor y = of.b(of.second(at::sin(of.a(of.first(x)))));
            return Tripled::apply(of.third(Tripled::apply(y)));
        };
    };
    expect_exact(build, signals());
}

TEST(ExactFunctions, OfTheirOwnGradientMayBeTheResultOfABarrierAndTheInputOfTheNext) {
    const auto build = [](Module& module) -> Forward {
        Chain of(module);
        return [=](const at::Tensor& x) mutable { return of.third(of.b(Tripled::apply(of.a(of.first(x))))); };
    };
    expect_exact(build, signals());
}

TEST(ExactFunctions, MayHaveSeveralResults) {
    const auto build = [](Module& module) -> Forward {
        Chain of(module);
        return [=](const at::Tensor& x) mutable {
            const at::Tensor y = of.first(x), z = at::tanh(of.a(y));
            const variable_list powers = Powers::apply(z, y);
            const at::Tensor next = at::tanh(of.b(of.second(powers[0])));
            return of.third(next + powers[1]);
        };
    };
    expect_exact(build, signals());
}

TEST(ExactFunctions, MayHaveResultsThatAreNotUsed) {
    for (const std::size_t used : {0, 1}) {
        const auto build = [used](Module& module) -> Forward {
            Chain of(module);
            return [=](const at::Tensor& x) mutable {
                const at::Tensor y = of.first(x), z = at::tanh(of.a(y));
                return of.third(at::tanh(of.b(of.second(Powers::apply(z, y)[used]))));
            };
        };
        expect_exact(build, signals());
    }
}

TEST(ExactFunctions, MayBeChained) {
    const auto build = [](Module& module) -> Forward {
        Chain of(module);
        return [=](const at::Tensor& x) mutable {
            const at::Tensor y = of.first(x);
            const variable_list powers = Powers::apply(y, Tripled::apply(y));
            const variable_list more = Powers::apply(powers[0], powers[0] + powers[1]);
            const at::Tensor z = at::tanh(of.a(more[0])) + Tripled::apply(Tripled::apply(powers[1]));
            return of.third(at::tanh(of.b(of.second(z)))) + Tripled::apply(more[1]).narrow(1, 0, 2);
        };
    };
    expect_exact(build, signals());
}

TEST(ExactFunctions, MayTakeAParameter) {
    const auto build = [](Module& module) -> Forward {
        Chain of(module);
        at::Tensor scale = module.register_parameter("scale", at::rand({1, 4, 5}, at::kDouble) + 0.5);
        return [=](const at::Tensor& x) mutable {
            const at::Tensor y = at::tanh(of.a(of.first(x)));
            const at::Tensor z = Powers::apply(y, scale.expand_as(y))[0] + Tripled::apply(scale);
            return of.third(at::tanh(of.b(of.second(z)))) * scale.narrow(1, 0, 2);
        };
    };
    expect_exact(build, signals());
}

TEST(ExactFunctions, MayTakeAView) {
    const auto build = [](Module& module) -> Forward {
        Chain of(module);
        return [=](const at::Tensor& x) mutable {
            const at::Tensor y = at::tanh(of.a(of.first(x)));
            const at::Tensor z = Tripled::apply(y.flatten(1)).view_as(y) + Tripled::apply(y.transpose(1, 2)).mT();
            return Tripled::apply(of.third(at::tanh(of.b(of.second(z)))).narrow(2, 1, 3));
        };
    };
    expect_exact(build, signals());
}

TEST(ExactFunctions, MayHaveTheirResultsChangedInPlace) {
    const auto build = [](Module& module) -> Forward {
        Chain of(module);
        return [=](const at::Tensor& x) mutable {
            at::Tensor y = Tripled::apply(of.first(x));
            y.add_(x.sum(1, true)).relu_();
            at::Tensor z = Tripled::apply(at::tanh(of.a(of.second(y))));
            z += y;
            return of.third(at::tanh(of.b(z)));
        };
    };
    expect_exact(build, signals());
}

TEST(ExactFunctions, OfThisLibraryAreRight) {
    const auto build = [](Module& module) -> Forward {
        Chain of(module);
        return [=](const at::Tensor& x) mutable {
            return of.third(gelu_tanh(of.b(of.second(gelu_tanh(of.a(of.first(x)))))));
        };
    };
    expect_exact(build, signals());
}

/// Seven vectors of width three, with a class each, one of them ignored.
Batch classified() {
    Batch batch = normed_batch({7, 3});
    batch.fields[1] = test::tensor_of({0, 3, 2, -100, 1, 0, 3}, at::kLong);
    return batch;
}

TEST(ExactFunctions, MayBeTheLoss) {
    const auto build = [](Module& module) -> Forward {
        auto first = add(module, "first", torch::nn::Linear(3, 4));
        auto norm = add(module, "norm", BatchNorm1d(4));
        return [=](const at::Tensor& x) mutable { return norm(first(x)); };
    };
    expect_exact(build, classified(), {3, 4, 7}, [](const at::Tensor& y, const Batch& batch) -> WeightedLoss {
        return {cross_entropy_sum(y, batch.fields[1]), count_targets(batch.fields[1])};
    });
}

TEST(ExactFunctions, MayBeTheLossAndTheLastLayerInOne) {
    for (const bool at_once : {false, true}) {
        at::Tensor weight;
        const auto build = [&weight](Module& module) -> Forward {
            auto first = add(module, "first", torch::nn::Linear(3, 5));
            auto norm = add(module, "norm", BatchNorm1d(5));
            weight = add(module, "head", torch::nn::Linear(torch::nn::LinearOptions(5, 4).bias(false)))->weight;
            return [=, w = weight](const at::Tensor& x) mutable { return norm(first(x)); };
        };
        const auto loss = [&](const at::Tensor& y, const Batch& batch) -> WeightedLoss {
            const at::Tensor sum = at_once ? linear_cross_entropy_sum_at_once(y, weight, batch.fields[1])
                                           : linear_cross_entropy_sum(y, weight, batch.fields[1]);
            return {sum, count_targets(batch.fields[1])};
        };
        expect_exact(build, classified(), {3, 4, 7}, loss);
    }
}

TEST(ExactFunctions, ThatContainABatchNormAreRefused) {
    const auto build = [](Module& module) -> Forward {
        Chain of(module);
        return [=, &module](const at::Tensor& x) mutable {
            const auto block = [of](const at::Tensor& input) mutable { return at::tanh(of.a(of.first(input))); };
            return of.third(recompute(block, x.detach().requires_grad_(true), module.shared_from_this()));
        };
    };
    const Net net = make_net(build);
    expect_usage_error({"BatchNorm", "own gradient", "deferred"}, [&] {
        left_by(net, signals(), {.micro_batch = 3, .batch_norm = BatchNorm::exact}, loss_with(net));
    });
}

}  // namespace
}  // namespace microbatch
