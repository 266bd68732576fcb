// Exact BatchNorm in models with parts that bring their own gradient, have none, or draw random numbers.
#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <c10/util/ScopeExit.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/nn/modules/rnn.h>

#include <limits>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "microbatch/autograd/recompute.h"
#include "microbatch/ops/cross_entropy.h"
#include "microbatch/ops/gelu.h"
#include "microbatch/ops/linear_cross_entropy.h"
#include "support/batch_norm.h"
#include "support/errors.h"

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

Batch signals() {
    return normed_batch({7, 3, 5});
}

/// A convolution, a norm and another one, with a function before, between or after.
struct Chain {
    explicit Chain(Module& module)
        : first(add(module, "first", conv1d(3, 4))),
          second(add(module, "second", conv1d(4, 4))),
          third(add(module, "third", conv1d(4, 2))),
          a(add(module, "a", BatchNorm1d(4))),
          b(add(module, "b", BatchNorm1d(4))) {}

    torch::nn::Conv1d first, second, third;
    BatchNorm1d a, b;
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
    batch.fields[1] = at::tensor({0, 3, 2, -100, 1, 0, 3}, at::kLong);
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

/// Random factors, which the batch at once can be given afterwards: by place in the model, one for each sample.
class Masks {
public:
    using Draw = std::function<at::Tensor(const at::Tensor& like)>;

    explicit Masks(Draw draw) : draw_(std::move(draw)) {}

    at::Tensor operator()(const at::Tensor& like, const std::string& place) {
        if (given_) return all_.at(place);
        const at::Tensor mask = draw_(like);
        seen_[place].push_back(mask.detach().clone());
        return mask;
    }

    /// From now on those that were drawn last, for so many micro-batches.
    void give(std::size_t micro_batches) {
        for (auto& [place, masks] : seen_)
            all_[place] = at::cat(std::vector(masks.end() - static_cast<std::ptrdiff_t>(micro_batches), masks.end()));
        given_ = true;
    }

private:
    Draw draw_;
    std::map<std::string, std::vector<at::Tensor>> seen_;
    std::map<std::string, at::Tensor> all_;
    bool given_ = false;
};

Build with_masks(const std::shared_ptr<Masks>& masks) {
    return [masks](Module& module) -> Forward {
        Chain of(module);
        return [=](const at::Tensor& x) mutable {
            at::Tensor y = of.first(x);
            y = at::sin(of.a(y * (*masks)(y, "before")));
            y = y + of.second(y * (*masks)(y, "between"));
            y = at::tanh(of.b(y));
            return of.third(y * (*masks)(y, "after"));
        };
    };
}

void expect_exact_with(const Masks::Draw& draw) {
    for (const bool recompute : {false, true}) {
        SCOPED_TRACE(recompute);
        const auto masks = std::make_shared<Masks>(draw);
        const Net net = make_net(with_masks(masks));
        at::manual_seed(5);
        const Plan plan{.micro_batch = 3, .recompute = recompute, .batch_norm = BatchNorm::exact};
        const Left found = left_by(net, signals(), plan, loss_with(net));
        masks->give(3);
        const Net native = make_net(with_masks(masks));
        expect_left(found, left_at_once(native, signals(), loss_with(native)), exact_bar);
    }
}

TEST(ExactDropout, HasTheSameMasksInForwardAndBackward) {
    expect_exact_with([](const at::Tensor& like) { return at::dropout(at::ones_like(like), 0.4, true); });
}

TEST(ExactDropout, MayDropWholeChannels) {
    expect_exact_with([](const at::Tensor& like) { return at::feature_dropout(at::ones_like(like), 0.4, true); });
}

TEST(ExactDropout, MayBeDrawnInPlace) {
    expect_exact_with([](const at::Tensor& like) { return at::empty_like(like).bernoulli_(0.4); });
    expect_exact_with([](const at::Tensor& like) { return at::zeros_like(like).uniform_(0.4, 1.0).exponential_(); });
}

TEST(ExactDropout, MayBeAnyNoise) {
    expect_exact_with(
        [](const at::Tensor& like) { return at::randn_like(like) + at::rand(like.sizes(), like.options()); });
    expect_exact_with([](const at::Tensor& like) {
        return at::randperm(like.numel(), at::kLong).view_as(like).to(at::kDouble) / 50.0 +
               at::poisson(at::ones_like(like)) + at::normal(at::zeros_like(like), 0.3);
    });
    expect_exact_with([](const at::Tensor& like) {
        const at::Tensor drawn = at::multinomial(at::ones({like.numel()}, at::kDouble), 20);
        return at::ones_like(like) + at::zeros({like.numel()}, at::kDouble).index_fill(0, drawn, 1.0).view_as(like);
    });
}

TEST(ExactDropout, MayBeThatOfAttention) {
    expect_exact_with([](const at::Tensor& like) {
        const at::Tensor q = at::ones_like(like).unsqueeze(1);
        return at::scaled_dot_product_attention(q, q, q, {}, 0.4).squeeze(1) + 1.0;
    });
}

TEST(ExactDropout, MayBeThatOfARecurrentLayer) {
    const auto lstm = std::make_shared<torch::nn::LSTM>(torch::nn::LSTMOptions(5, 5).num_layers(2).dropout(0.5));
    (*lstm)->to(at::kDouble);
    expect_exact_with([lstm](const at::Tensor& like) {
        return 2.0 * std::get<0>((*lstm)->forward(at::ones_like(like).transpose(0, 1))).transpose(0, 1);
    });
}

TEST(ExactDropout, MayBeDrawnFromAGeneratorOfItsOwnOrIsRefused) {
    auto random = std::make_shared<at::Generator>(generator(11));
    const auto draw = [random](const at::Tensor& like) {
        return at::bernoulli(at::full_like(like, 0.5), *random) + at::rand(like.sizes(), *random, like.options());
    };
    try {
        expect_exact_with(draw);
    } catch (const Error& error) {
        expect_usage_error({"aten::", "generator", "deferred"}, [&] { throw error; });
    }
}

TEST(ExactDropout, LeavesTheGeneratorAfterAllForwardsWhateverIsRecomputed) {
    at::Generator global = at::globalContext().defaultGenerator(at::kCPU);
    const auto state_after = [&](std::int64_t micro_batch, bool recompute) {
        const auto masks =
            std::make_shared<Masks>([](const at::Tensor& like) { return at::dropout(at::ones_like(like), 0.4, true); });
        const Net net = make_net(with_masks(masks));
        at::manual_seed(5);
        left_by(net, signals(), {.micro_batch = micro_batch, .recompute = recompute, .batch_norm = BatchNorm::exact},
                loss_with(net));
        return global.get_state();
    };
    const at::Tensor at_once = state_after(7, false);
    for (const std::int64_t micro_batch : {1, 3, 7}) {
        const at::Tensor state = state_after(micro_batch, false);
        EXPECT_TRUE(same_bits(state, state_after(micro_batch, true)));
        // Every number of a mask is drawn once; torch draws sixteen or more of a kind in another way.
        if (micro_batch == 7) {
            EXPECT_TRUE(same_bits(state, at_once));
        }
    }
}

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
