// The block in one operation against the same block by torch's operators in double.
#include "microbatch/ops/transformer_block.h"

#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "microbatch/autograd/in_place_gradients.h"
#include "microbatch/core/error.h"
#include "microbatch/runtime/parallel.h"
#include "support/gradients.h"
#include "support/one_thread.h"

namespace {

using namespace microbatch;
using test::relative_difference;
using test::same_bits;

constexpr const char* names[] = {
    "attention_norm_scale", "attention_norm_shift", "qkv_weight",         "qkv_bias",
    "projection_weight",    "projection_bias",      "mlp_norm_scale",     "mlp_norm_shift",
    "expansion_weight",     "expansion_bias",       "contraction_weight", "contraction_bias"};

struct Block {
    std::int64_t heads;
    std::vector<at::Tensor> weights;

    Block(std::int64_t width, std::int64_t inner, std::int64_t heads_) : heads(heads_) {
        const auto add = [this](at::IntArrayRef sizes, double mean, double deviation) {
            weights.push_back((at::randn(sizes) * deviation + mean).requires_grad_());
        };
        const auto add_linear = [&](std::int64_t inputs, std::int64_t outputs) {
            add({outputs, inputs}, 0, 1 / std::sqrt(static_cast<double>(inputs)));
            add({outputs}, 0, 0.5);
        };
        const auto add_norm = [&] {
            add({width}, 1, 0.3);
            add({width}, 0, 0.3);
        };
        add_norm();
        add_linear(width, 3 * width);
        add_linear(width, width);
        add_norm();
        add_linear(width, inner);
        add_linear(inner, width);
    }

    Block to(at::ScalarType type) const {
        Block result = *this;
        for (at::Tensor& one : result.weights) one = one.detach().to(type).requires_grad_();
        return result;
    }

    TransformerWeights operator()() const {
        const auto& w = weights;
        return {w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], w[8], w[9], w[10], w[11]};
    }

    void clear() const {
        for (const at::Tensor& one : weights) one.mutable_grad() = at::Tensor();
    }
};

at::Tensor some_input(std::int64_t samples, std::int64_t tokens, std::int64_t width) {
    return at::randn({samples, tokens, width}).requires_grad_();
}

/// What is differentiated: no direction of the result is special.
at::Tensor scalar_of(const at::Tensor& out) {
    return (out * at::arange(out.numel(), out.options()).view_as(out).sin()).sum();
}

bool is_fast(const at::Tensor& out) {
    return out.grad_fn()->name().find("FusedBlock") != std::string::npos;
}

// Relative to a tensor's norm: each product adds the rounding of a sum of up to `inner` numbers, about 6e-8 times the
// root of their number in the worst tensors, through six products after one another; the key's bias, whose gradient is
// 0 but for rounding, is measured with its neighbours in qkv_bias.
constexpr double tolerance = 3e-6;

TEST(TransformerBlock, HasTheValueAndEveryGradientOfTorchsOperatorsInDouble) {
    at::manual_seed(1);
    for (const auto& [samples, tokens, width, inner, heads] : {std::array<std::int64_t, 5>{1, 1, 8, 32, 2},
                                                               {2, 5, 10, 12, 5},
                                                               {3, 17, 16, 64, 4},
                                                               {1, 70, 36, 50, 3},
                                                               {8, 64, 128, 512, 4},
                                                               {2, 33, 48, 1, 1}}) {
        SCOPED_TRACE(std::to_string(samples) + " x " + std::to_string(tokens) + " x " + std::to_string(width));
        const Block block(width, inner, heads), exact = block.to(at::kDouble);
        const at::Tensor x = some_input(samples, tokens, width), x64 = x.detach().to(at::kDouble).requires_grad_();
        const at::Tensor out = transformer_block(x, block(), heads);
        ASSERT_TRUE(is_fast(out));
        const at::Tensor expected = transformer_block_by_operators(x64, exact(), heads);
        EXPECT_LE(relative_difference(out, expected), tolerance);
        scalar_of(out).backward();
        scalar_of(expected).backward();
        EXPECT_LE(relative_difference(x.grad(), x64.grad()), tolerance);
        for (std::size_t i = 0; i < block.weights.size(); ++i) {
            EXPECT_LE(relative_difference(block.weights[i].grad(), exact.weights[i].grad()), tolerance) << names[i];
        }
    }
}

/// Hugging Face's form: weights [inputs, outputs].
Block turned(const Block& block) {
    Block result = block;
    for (const std::size_t i : {2, 4, 8, 10}) {
        result.weights[i] = block.weights[i].detach().t().contiguous().requires_grad_();
    }
    return result;
}

TEST(TransformerBlock, OfWeightsWithTheirInputsFirstIsTheSameInAndOutsideAScope) {
    at::manual_seed(14);
    const TransformerDetails plain{.epsilon = 0.1}, details{.epsilon = 0.1, .inputs_first = true};
    for (const bool in_scope : {false, true}) {
        const Block block(20, 30, 2), other = turned(block);
        const at::Tensor x = some_input(2, 9, 20), y = x.detach().clone().requires_grad_();
        for (int pass = 0; pass < 2; ++pass) {  // the second one adds
            std::optional<InPlaceGradients> scope;
            if (in_scope) scope.emplace();
            const at::Tensor out = transformer_block(x, block(), 2, {}, plain);
            const at::Tensor same = transformer_block(y, other(), 2, {}, details);
            ASSERT_TRUE(is_fast(out) && is_fast(same));
            EXPECT_LE(relative_difference(same, out), tolerance);
            EXPECT_LE(relative_difference(transformer_block_by_operators(y, other(), 2, {}, details), out), tolerance);
            scalar_of(out).backward();
            scalar_of(same).backward();
        }
        EXPECT_LE(relative_difference(y.grad(), x.grad()), tolerance);
        for (std::size_t i = 0; i < block.weights.size(); ++i) {
            const bool matrix = block.weights[i].dim() == 2;
            const at::Tensor gradient = matrix ? other.weights[i].grad().t() : other.weights[i].grad();
            EXPECT_LE(relative_difference(gradient, block.weights[i].grad()), tolerance) << names[i];
        }
    }
}

TEST(TransformerBlock, OfPaddingIsThatOfTheOperatorsInDouble) {
    at::manual_seed(15);
    const Block block(20, 30, 2), exact = block.to(at::kDouble);
    const TransformerDetails details{.lengths = at::tensor({4, 1, 9}, at::kLong)};
    const at::Tensor x = some_input(3, 9, 20), x64 = x.detach().to(at::kDouble).requires_grad_();
    const at::Tensor out = transformer_block(x, block(), 2, {}, details);
    ASSERT_TRUE(is_fast(out));
    const at::Tensor expected = transformer_block_by_operators(x64, exact(), 2, {}, details);
    EXPECT_LE(relative_difference(out, expected), tolerance);
    scalar_of(out).backward();
    scalar_of(expected).backward();
    EXPECT_LE(relative_difference(x.grad(), x64.grad()), tolerance);
    for (std::size_t i = 0; i < block.weights.size(); ++i) {
        EXPECT_LE(relative_difference(block.weights[i].grad(), exact.weights[i].grad()), tolerance) << names[i];
    }
    EXPECT_THROW(transformer_block(x, block(), 2, {}, {.lengths = at::tensor({4, 1, 10}, at::kLong)}), Error);
}

/// The same block with RMS norms.
TransformerWeights without_shifts(const Block& block) {
    TransformerWeights weights = block();
    weights.attention_norm_shift = weights.mlp_norm_shift = at::Tensor();
    return weights;
}

TEST(TransformerBlock, WithoutShiftsHasRmsNormsInAndOutsideAScope) {
    at::manual_seed(16);
    for (const bool in_scope : {false, true}) {
        const Block block(20, 30, 2), exact = block.to(at::kDouble);
        const at::Tensor x = some_input(3, 19, 20), x64 = x.detach().to(at::kDouble).requires_grad_();
        for (int pass = 0; pass < 2; ++pass) {  // the second one adds
            std::optional<InPlaceGradients> scope;
            if (in_scope) scope.emplace();
            const at::Tensor out = transformer_block(x, without_shifts(block), 2);
            const at::Tensor expected = transformer_block_by_operators(x64, without_shifts(exact), 2);
            ASSERT_TRUE(is_fast(out));
            EXPECT_LE(relative_difference(out, expected), tolerance);
            EXPECT_GT(relative_difference(out, transformer_block(x, block(), 2)), 0.01);
            scalar_of(out).backward();
            scalar_of(expected).backward();
        }
        EXPECT_LE(relative_difference(x.grad(), x64.grad()), tolerance);
        for (std::size_t i = 0; i < block.weights.size(); ++i) {
            const bool is_shift = i == 1 || i == 7;
            ASSERT_EQ(block.weights[i].grad().defined(), !is_shift) << names[i];
            if (is_shift) continue;
            EXPECT_LE(relative_difference(block.weights[i].grad(), exact.weights[i].grad()), tolerance) << names[i];
        }
    }
}

TEST(TransformerBlock, UsesTorchsOperatorsForALayerNormBesideAnRmsNorm) {
    at::manual_seed(17);
    const Block block(16, 64, 2);
    TransformerWeights weights = block();
    weights.mlp_norm_shift = at::Tensor();
    const at::Tensor x = some_input(2, 9, 16), out = transformer_block(x, weights, 2);
    EXPECT_FALSE(is_fast(out));
    EXPECT_TRUE(same_bits(out, transformer_block_by_operators(x, weights, 2)));
}

TEST(TransformerBlock, HasTheSameValuesOnTwoThreads) {
    at::manual_seed(2);
    const Block block(64, 256, 4);
    const at::Tensor x = some_input(3, 50, 64);
    const auto run = [&](int threads) {
        at::set_num_threads(threads);
        block.clear();
        x.mutable_grad() = at::Tensor();
        const at::Tensor out = transformer_block(x, block(), 4);
        scalar_of(out).backward();
        std::vector<at::Tensor> results{out.detach(), x.grad()};
        for (const at::Tensor& one : block.weights) results.push_back(one.grad());
        at::set_num_threads(1);
        return results;
    };
    const auto one = run(1), two = run(2), again = run(2);
    for (std::size_t i = 0; i < one.size(); ++i) {
        EXPECT_LE(relative_difference(two[i], one[i]), tolerance) << i;
        EXPECT_TRUE(same_bits(two[i], again[i])) << i;
    }
}

TEST(TransformerBlock, IsTheSameWithoutAGradient) {
    at::manual_seed(3);
    const Block block(16, 64, 2);
    const at::Tensor x = some_input(2, 9, 16), recorded = transformer_block(x, block(), 2);
    const at::NoGradGuard no_grad;
    EXPECT_TRUE(same_bits(transformer_block(x, block(), 2), recorded));
}

TEST(TransformerBlock, AddsToGradientsWhereTheyAreInAScope) {
    at::manual_seed(4);
    const Block block(16, 64, 2);
    const at::Tensor x = some_input(2, 9, 16);
    std::vector<at::Tensor> once;
    std::vector<const void*> places;
    const InPlaceGradients scope;
    scalar_of(transformer_block(x, block(), 2)).backward();
    for (const at::Tensor& one : block.weights) {
        once.push_back(one.grad().clone());
        places.push_back(one.grad().const_data_ptr());
    }
    scalar_of(transformer_block(x, block(), 2)).backward();
    for (std::size_t i = 0; i < places.size(); ++i) {
        EXPECT_EQ(block.weights[i].grad().const_data_ptr(), places[i]) << names[i];
        EXPECT_LE(relative_difference(block.weights[i].grad(), once[i] * 2), 1e-6) << names[i];
    }
}

TEST(TransformerBlock, LeavesGradientsToAutogradWhereAHookWantsThem) {
    at::manual_seed(5);
    const Block block(16, 64, 2);
    const at::Tensor x = some_input(2, 9, 16);
    const InPlaceGradients scope;
    scalar_of(transformer_block(x, block(), 2)).backward();
    std::vector<at::Tensor> seen(block.weights.size());
    for (std::size_t i = 0; i < seen.size(); ++i) {
        block.weights[i].register_hook([&seen, i](const at::Tensor& gradient) { seen[i] = gradient.clone(); });
    }
    std::vector<at::Tensor> before;
    for (const at::Tensor& one : block.weights) before.push_back(one.grad().clone());
    scalar_of(transformer_block(x, block(), 2)).backward();
    for (std::size_t i = 0; i < seen.size(); ++i) {
        ASSERT_TRUE(seen[i].defined()) << names[i];
        EXPECT_TRUE(same_bits(seen[i], before[i])) << names[i];
        EXPECT_LE(relative_difference(block.weights[i].grad(), before[i] * 2), 1e-6) << names[i];
    }
}

TEST(TransformerBlock, GivesNothingToWhatIsFrozen) {
    at::manual_seed(6);
    for (std::size_t frozen = 0; frozen <= 12; ++frozen) {
        const Block block(16, 64, 2), all = block.to(at::kFloat);
        const at::Tensor x = some_input(2, 9, 16), other = x.detach().clone().requires_grad_();
        if (frozen < 12) block.weights[frozen].requires_grad_(false);
        if (frozen == 12) x.requires_grad_(false);
        scalar_of(transformer_block(x, block(), 2)).backward();
        scalar_of(transformer_block(other, all(), 2)).backward();
        EXPECT_EQ(x.grad().defined(), frozen != 12);
        for (std::size_t i = 0; i < 12; ++i) {
            ASSERT_EQ(block.weights[i].grad().defined(), i != frozen);
            if (i != frozen) {
                EXPECT_TRUE(same_bits(block.weights[i].grad(), all.weights[i].grad()));
            }
        }
    }
}

TEST(TransformerBlock, CanBeDifferentiatedTwice) {
    at::manual_seed(7);
    const Block block(8, 16, 2), exact = block.to(at::kDouble);
    const at::Tensor x = some_input(2, 5, 8), x64 = x.detach().to(at::kDouble).requires_grad_();
    // The gradient of the squared norm of the gradient.
    const auto twice = [](const at::Tensor& out, const at::Tensor& input, const Block& of) {
        std::vector<at::Tensor> inputs = of.weights;
        inputs.push_back(input);
        at::Tensor norm = at::zeros({}, out.options());
        for (const at::Tensor& one : torch::autograd::grad({scalar_of(out)}, inputs, {}, std::nullopt, true)) {
            norm = norm + one.square().sum();
        }
        return torch::autograd::grad({norm}, inputs, {}, std::nullopt, false, /*allow_unused=*/true);
    };
    at::globalContext().setSDPUseFlash(false);  // in double it is torch's attention, whose fast one has no second
    const at::Tensor out = transformer_block(x, block(), 2);
    ASSERT_TRUE(is_fast(out));
    const auto ours = twice(out, x, block);
    const auto expected = twice(transformer_block_by_operators(x64, exact(), 2), x64, exact);
    at::globalContext().setSDPUseFlash(true);
    for (std::size_t i = 0; i < ours.size(); ++i) {
        ASSERT_EQ(ours[i].defined(), expected[i].defined()) << i;
        if (ours[i].defined()) {
            EXPECT_LE(relative_difference(ours[i], expected[i]), 1e-5) << i;  // of gradients known to 3e-6
        }
    }
}

// What is shared, or looked at by a hook, must not be counted twice.
TEST(TransformerBlock, HasTheSameGradientsWithAGraphOfThem) {
    at::manual_seed(11);
    Block block(8, 16, 2);
    block.weights[6] = block.weights[0];
    const at::Tensor x = some_input(2, 5, 8);
    x.register_hook([](const at::Tensor& gradient) { return gradient * 0.5; });
    std::vector<at::Tensor> inputs = block.weights;
    inputs.push_back(x);
    const auto gradients = [&](bool create_graph) {
        const at::Tensor out = transformer_block(transformer_block(x, block(), 2), block(), 2);
        return torch::autograd::grad({scalar_of(out)}, inputs, {}, std::nullopt, create_graph);
    };
    const auto plain = gradients(false), with_graph = gradients(true);
    for (std::size_t i = 0; i < plain.size(); ++i) {
        EXPECT_LE(relative_difference(with_graph[i], plain[i]), tolerance) << i;
    }
}

TEST(TransformerBlock, ReportsThatAnAccumulatedGradientHasChanged) {
    at::manual_seed(12);
    const Block block(16, 64, 2);
    const at::Tensor x = some_input(2, 9, 16), factor = at::ones({48, 16}).requires_grad_();
    const InPlaceGradients scope;
    scalar_of(transformer_block(x, block(), 2)).backward();
    const at::Tensor later = (block.weights[2].grad() * factor).sum();
    scalar_of(transformer_block(x, block(), 2)).backward();
    EXPECT_THROW(later.backward(), c10::Error);
}

TEST(TransformerBlock, RunsInAThreadOfSomebodyElse) {
    at::manual_seed(13);
    const Block block(16, 64, 2);
    const at::Tensor x = some_input(1, 3, 16);
    const at::NoGradGuard no_grad;
    const at::Tensor expected = transformer_block(x, block(), 2);
    at::set_num_threads(4);
    in_parallel(4, 1, [&](std::int64_t, std::int64_t) {
        const at::NoGradGuard none;
        EXPECT_TRUE(same_bits(transformer_block(x, block(), 2), expected));
    });
    at::set_num_threads(1);
}

TEST(TransformerBlock, UsesTorchsOperatorsForEverythingElse) {
    at::manual_seed(8);
    const Block block(16, 64, 2), exact = block.to(at::kDouble);
    const at::Tensor x = some_input(2, 9, 16), x64 = x.detach().to(at::kDouble).requires_grad_();
    EXPECT_TRUE(same_bits(transformer_block(x64, exact(), 2), transformer_block_by_operators(x64, exact(), 2)));
    at::manual_seed(1);
    const at::Tensor dropped = transformer_block(x, block(), 2, {0.5, 0.5});
    at::manual_seed(1);
    EXPECT_TRUE(same_bits(dropped, transformer_block_by_operators(x, block(), 2, {0.5, 0.5})));
    EXPECT_FALSE(same_bits(dropped, transformer_block(x, block(), 2)));
    Block columns = block;
    columns.weights[2] = block.weights[2].detach().t().contiguous().t().requires_grad_();
    EXPECT_LE(relative_difference(transformer_block(x, columns(), 2), transformer_block(x, block(), 2)), tolerance);
}

TEST(TransformerBlock, AcceptsAnInputOfAnyLayout) {
    at::manual_seed(9);
    const Block block(16, 64, 2);
    const at::Tensor x = at::randn({9, 2, 16}).transpose(0, 1).requires_grad_();
    const at::Tensor dense = x.detach().contiguous().requires_grad_();
    const at::Tensor out = transformer_block(x, block(), 2), expected = transformer_block(dense, block(), 2);
    EXPECT_TRUE(same_bits(out, expected));
    // A gradient that is expanded, too.
    out.sum().backward();
    expected.sum().backward();
    EXPECT_TRUE(same_bits(x.grad(), dense.grad()));
}

TEST(TransformerBlock, RefusesMismatchedInputs) {
    const Block block(16, 64, 2);
    EXPECT_THROW(transformer_block(some_input(2, 9, 16), block(), 3), Error);
    EXPECT_ANY_THROW(transformer_block(some_input(2, 9, 12), block(), 2));
    Block wrong = block;
    std::swap(wrong.weights[8], wrong.weights[10]);
    EXPECT_ANY_THROW(transformer_block(some_input(2, 9, 16), wrong(), 2));
}

TEST(TransformerBlock, RefusesABackwardAfterAWeightWasChanged) {
    const Block block(16, 64, 2);
    const at::Tensor out = transformer_block(some_input(2, 9, 16), block(), 2);
    {
        const at::NoGradGuard no_grad;
        block.weights[4].add_(1);
    }
    EXPECT_THROW(out.sum().backward(), c10::Error);
}

TEST(TransformerBlock, OfNanIsNanFromThatTokenOn) {
    at::manual_seed(10);
    const Block block(16, 64, 2);
    const at::NoGradGuard no_grad;
    at::Tensor x = at::randn({2, 20, 16});
    x.index_put_({at::tensor(1), at::tensor(13), at::tensor(3)}, at::tensor(std::nanf("")));
    const at::Tensor nan = transformer_block(x, block(), 2).isnan().any(2);
    EXPECT_FALSE(nan[0].any().item<bool>());
    EXPECT_FALSE(nan[1].narrow(0, 0, 12).any().item<bool>());  // the attention's tile of six may be reached
    EXPECT_TRUE(nan[1].narrow(0, 13, 7).all().item<bool>());
}

}  // namespace
