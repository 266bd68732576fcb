#include "microbatch/autograd/recompute.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <functional>
#include <memory>
#include <vector>

#include "autograd/chain.h"
#include "support/errors.h"
#include "support/gradients.h"
#include "support/one_thread.h"

namespace microbatch {
namespace {

using namespace test;

using Prepare = std::function<void(Chain&)>;

/// Some forward passes, then their backward passes in the other order, so that generator and buffers have moved on.
Named train(bool on, bool input_grad, const Prepare& prepare) {
    const auto chain = make_chain(on);
    prepare(*chain);
    const at::Tensor x = input(input_grad);
    at::manual_seed(9);
    std::vector<at::Tensor> outputs;
    for (int pass = 0; pass < 3; ++pass) outputs.push_back(chain->forward(x * (1 + pass)));
    for (int pass = 2; pass >= 0; --pass) outputs[pass].square().sum().backward();
    Named all = traces(*chain);
    for (const at::Tensor& y : outputs) all.push_back({"output", y.detach()});
    if (x.grad().defined()) all.push_back({"input", x.grad()});
    return all;
}

void expect_no_difference(
    bool input_grad = true, const Prepare& prepare = [](Chain&) {}) {
    const Named plain = train(false, input_grad, prepare);
    EXPECT_EQ(plain.back().name, input_grad ? "input" : "output");
    expect_same_bits(train(true, input_grad, prepare), plain);
}

TEST(Recompute, ChangesNoBitWithDropoutBatchNormAndMovingBuffers) {
    for (const int threads : {1, 2}) {
        at::set_num_threads(threads);
        expect_no_difference();
    }
    at::set_num_threads(1);
}

TEST(Recompute, RunsABlockTwiceAndOnlyForAGradient) {
    const auto chain = make_chain(true, 1);
    at::Tensor y = chain->forward(input());
    EXPECT_EQ(chain->parts[0]->runs, 1);
    y.sum().backward();
    EXPECT_EQ(chain->parts[0]->runs, 2);
    const at::NoGradGuard no_grad;
    EXPECT_FALSE(chain->forward(input()).requires_grad());
    EXPECT_EQ(chain->parts[0]->runs, 3);
}

TEST(Recompute, TracksParametersWhereTheInputNeedsNoGradient) {
    expect_no_difference(false);
}

TEST(Recompute, LeavesFrozenParametersAlone) {
    expect_no_difference(true, [](Chain& chain) {
        chain.parts[0]->up->weight.requires_grad_(false);
        for (const at::Tensor& parameter : chain.parts[1]->parameters()) parameter.set_requires_grad(false);
    });
    const auto chain = make_chain(true);
    for (const at::Tensor& parameter : chain->parameters()) parameter.set_requires_grad(false);
    EXPECT_FALSE(chain->forward(input(false)).requires_grad());
    const at::Tensor x = input();
    chain->forward(x).sum().backward();
    EXPECT_TRUE(x.grad().defined());
    for (const at::Tensor& parameter : chain->parameters()) EXPECT_FALSE(parameter.grad().defined());
}

TEST(Recompute, EvaluatesWithGradientsInEvaluationMode) {
    expect_no_difference(true, [](Chain& chain) { chain.eval(); });
}

TEST(Recompute, RunsUnderTheTrainingFlagsOfForward) {
    const auto late_change = [](bool on) {
        const auto chain = make_chain(on);
        chain->parts[1]->norm->eval();
        at::manual_seed(9);
        const at::Tensor y = chain->forward(input());
        chain->eval();
        chain->parts[2]->dropout->train();
        y.square().sum().backward();
        EXPECT_FALSE(chain->parts[0]->is_training());
        EXPECT_FALSE(chain->parts[1]->dropout->is_training());
        EXPECT_TRUE(chain->parts[2]->dropout->is_training());
        return traces(*chain);
    };
    expect_same_bits(late_change(true), late_change(false));
}

TEST(Recompute, NestsInRecomputedBlocks) {
    const auto nested = [](bool on) {
        const auto chain = make_chain(on);
        const auto block = [chain](const at::Tensor& x) { return chain->forward(x); };
        const at::Tensor x = input();
        at::manual_seed(9);
        for (int pass = 0; pass < 2; ++pass) (on ? recompute(block, x, chain) : block(x)).square().sum().backward();
        EXPECT_EQ(chain->parts[0]->runs, on ? 6 : 2);
        Named all = traces(*chain);
        all.push_back({"input", x.grad()});
        return all;
    };
    expect_same_bits(nested(true), nested(false));
}

TEST(Recompute, GivesGradientsOfChosenInputs) {
    const auto chosen = [](bool on) {
        const auto chain = make_chain(on);
        const at::Tensor x = input();
        const auto& part = *chain->parts[1];
        const at::Tensor unused = at::ones({1}).requires_grad_();
        const auto found = torch::autograd::grad({chain->forward(x).square().sum()},
                                                 {part.up->weight, x, chain->parts[0]->down->bias, unused}, {}, {},
                                                 false, /*allow_unused=*/true);
        EXPECT_FALSE(found[3].defined());
        Named all = traces(*chain);  // no gradient there
        for (int i = 0; i < 3; ++i) all.push_back({"chosen", found[i]});
        torch::autograd::backward({chain->forward(x).square().sum()}, {}, {}, false, {part.down->weight});
        EXPECT_FALSE(part.up->weight.grad().defined());
        EXPECT_FALSE(x.grad().defined());
        all.push_back({"backward of an input", part.down->weight.grad()});
        return all;
    };
    expect_same_bits(chosen(true), chosen(false));
}

TEST(Recompute, CountsAParameterOfTwoNamesOnce) {
    const auto of_two_names = [](bool on, bool chosen) {
        const auto chain = make_chain(on, 2);
        chain->parts[0]->register_parameter("again", chain->parts[0]->up->weight);
        const at::Tensor y = chain->forward(input()).square().sum();
        if (chosen) return torch::autograd::grad({y}, {chain->parts[0]->up->weight})[0];
        y.backward();
        return chain->parts[0]->up->weight.grad();
    };
    for (const bool chosen : {false, true}) {
        EXPECT_TRUE(same_bits(of_two_names(true, chosen), of_two_names(false, chosen)));
    }
}

TEST(Recompute, CallsHooksOnceWithTheGradient) {
    const auto chain = make_chain(true);
    int calls = 0;
    chain->parts[1]->up->weight.register_hook([&](const at::Tensor& gradient) {
        ++calls;
        return gradient * 0;
    });
    chain->forward(input()).square().sum().backward();
    EXPECT_EQ(calls, 1);
    EXPECT_EQ(chain->parts[1]->up->weight.grad().abs().max().item<float>(), 0);
    EXPECT_GT(chain->parts[1]->down->weight.grad().abs().max().item<float>(), 0);
}

TEST(Recompute, PassesTheGradientOnInItsOwnLayout) {
    for (const bool on : {false, true}) {
        const auto part = std::make_shared<Part>();
        const at::Tensor x = input() * 1;
        std::vector<std::int64_t> strides;
        x.register_hook([&](const at::Tensor& gradient) { strides = gradient.strides().vec(); });
        const auto transpose = [](const at::Tensor& in) { return in.t(); };
        (on ? recompute(transpose, x, part) : transpose(x)).mul(at::ones({width, 6})).sum().backward();
        EXPECT_EQ(strides, (std::vector<std::int64_t>{1, 6})) << on;
    }
}

TEST(Recompute, RunsBackwardTwiceIfTheGraphIsRetained) {
    const auto twice = [](bool on) {
        const auto chain = make_chain(on);
        const at::Tensor y = chain->forward(input()).square().sum();
        y.backward({}, /*retain_graph=*/true);
        y.backward();
        return traces(*chain);
    };
    expect_same_bits(twice(true), twice(false));
}

TEST(Recompute, RefusesAGradientOfAGradient) {
    const auto chain = make_chain(true);
    const at::Tensor x = input();
    const at::Tensor y = chain->forward(x).square().sum();
    test::expect_usage_error({"create_graph", "turn recompute off"},
                             [&] { torch::autograd::grad({y}, {x}, {}, {}, /*create_graph=*/true); });
}

TEST(Recompute, NoticesAnInputOrAParameterChangedInPlace) {
    for (const bool of_input : {true, false}) {
        const auto chain = make_chain(true, 1);
        const at::Tensor x = input() * 1;
        const at::Tensor y = chain->forward(x);
        const at::NoGradGuard no_grad;
        (of_input ? x : chain->parts[0]->up->weight).add_(1);
        EXPECT_THROW(y.sum().backward(), c10::Error);
        EXPECT_EQ(chain->parts[0]->runs, 1);
    }
}

TEST(Recompute, GivesNoGradientWhereTheBlockDetaches) {
    const at::Tensor x = input();
    const auto cut = [](const at::Tensor& in) { return in.detach() * 2; };
    recompute(cut, x, std::make_shared<Part>()).sum().backward();
    EXPECT_FALSE(x.grad().defined());
}

TEST(Recompute, RunsUnderTheAutocastOfForward) {
    const auto cast = [](bool on) {
        const auto chain = make_chain(on);
        at::manual_seed(9);
        at::autocast::set_autocast_enabled(at::kCPU, true);
        at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
        const at::Tensor y = chain->forward(input());
        at::autocast::clear_cache();
        at::autocast::set_autocast_enabled(at::kCPU, false);
        y.square().sum().backward();
        EXPECT_FALSE(at::autocast::is_autocast_enabled(at::kCPU));
        EXPECT_TRUE(at::autocast::is_autocast_cache_enabled());
        return traces(*chain);
    };
    const Named plain = cast(false);
    EXPECT_EQ(plain.back().name, "part2.down.bias");
    expect_same_bits(cast(true), plain);
}

TEST(Recompute, LetsOthersSaveABuffer) {
    const auto part = std::make_shared<Part>();
    const at::Tensor x = input();
    // Batch norm moves it without a new version: plain torch goes back through this.
    const at::Tensor before = x * part->norm->running_var.narrow(0, 0, width);
    recompute([part](const at::Tensor& in) { return part->forward(in); }, before, part).square().sum().backward();
    EXPECT_TRUE(x.grad().defined());
}

}  // namespace
}  // namespace microbatch
