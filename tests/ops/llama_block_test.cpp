// The block in one operation against the same block by torch's operators in double.
#include "microbatch/ops/llama_block.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>

#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "microbatch/autograd/in_place_gradients.h"
#include "microbatch/core/error.h"
#include "support/gradients.h"
#include "support/one_thread.h"

namespace {

using namespace microbatch;
using test::relative_difference;
using test::same_bits;

struct Sizes {
    std::int64_t samples, tokens, width, heads, kv_heads, size, inner;
    bool biased;
};

struct LlamaCase {
    Sizes sizes;
    at::Tensor x, cosines, sines, lengths;
    std::vector<at::Tensor> weights;

    explicit LlamaCase(const Sizes& s, bool padded = false) : sizes(s) {
        x = at::randn({s.samples, s.tokens, s.width}).requires_grad_();
        cosines = at::randn({1, s.tokens, s.size});
        sines = at::randn({1, s.tokens, s.size});
        if (padded) lengths = at::randint(1, s.tokens + 1, {s.samples}, at::kLong);
        const std::int64_t q = s.heads * s.size, kv = s.kv_heads * s.size;
        add({s.width}, 1, 0.3);
        for (const std::int64_t outputs : {q, kv, kv}) add_linear(s.width, outputs);
        add_linear(q, s.width);
        add({s.width}, 1, 0.3);
        for (int i = 0; i < 2; ++i) add_linear(s.width, s.inner);
        add_linear(s.inner, s.width);
        if (!s.biased) return;
        for (const std::int64_t outputs : {q, kv, kv}) add({outputs}, 0, 0.5);
    }

    void add(at::IntArrayRef shape, double mean, double deviation) {
        weights.push_back((at::randn(shape) * deviation + mean).requires_grad_());
    }
    void add_linear(std::int64_t inputs, std::int64_t outputs) {
        add({outputs, inputs}, 0, 1 / std::sqrt(static_cast<double>(inputs)));
    }

    LlamaCase to(at::ScalarType type) const {
        LlamaCase result = *this;
        for (at::Tensor* one : {&result.x, &result.cosines, &result.sines}) *one = one->detach().to(type);
        result.x.requires_grad_();
        for (at::Tensor& one : result.weights) one = one.detach().to(type).requires_grad_();
        return result;
    }

    LlamaWeights all() const {
        const auto& w = weights;
        LlamaWeights result{w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], w[8]};
        if (w.size() > 9) std::tie(result.q_bias, result.k_bias, result.v_bias) = std::tie(w[9], w[10], w[11]);
        return result;
    }
    LlamaDetails details() const { return {sizes.heads, sizes.kv_heads, 1e-3, lengths}; }
    at::Tensor fused() const { return llama_block(x, cosines, sines, all(), details()); }
    at::Tensor by_operators() const { return llama_block_by_operators(x, cosines, sines, all(), details()); }
};

/// What is differentiated: no direction of the result is special.
at::Tensor scalar_of(const at::Tensor& out) {
    return (out * at::arange(out.numel(), out.options()).view_as(out).sin()).sum();
}

bool is_fast(const at::Tensor& out) {
    return out.grad_fn()->name().find("FusedLlama") != std::string::npos;
}

// As in transformer_block_test.cpp; the key's bias, whose gradient is small beside the terms that it is the sum of, is the
// worst.
constexpr double tolerance = 3e-6, bias_tolerance = 3e-5;

void expect_same_gradients(const LlamaCase& ours, const LlamaCase& theirs) {
    EXPECT_LE(relative_difference(ours.x.grad(), theirs.x.grad()), tolerance);
    for (std::size_t i = 0; i < ours.weights.size(); ++i) {
        const at::Tensor &gradient = ours.weights[i].grad(), &expected = theirs.weights[i].grad();
        if (expected.norm().item<double>() < 1e-12) {  // with one token, queries and keys do not matter
            EXPECT_LE(gradient.norm().item<double>(), 1e-5) << i;
        } else {
            EXPECT_LE(relative_difference(gradient, expected), i < 9 ? tolerance : bias_tolerance) << i;
        }
    }
}

TEST(LlamaBlock, HasTheValueAndEveryGradientOfTorchsOperatorsInDouble) {
    at::manual_seed(1);
    for (const Sizes& sizes :
         {Sizes{1, 1, 8, 2, 2, 4, 12, false}, Sizes{2, 5, 10, 4, 2, 6, 9, true}, Sizes{3, 17, 16, 4, 1, 8, 40, false},
          Sizes{2, 70, 36, 3, 3, 12, 50, true}, Sizes{8, 64, 128, 4, 2, 32, 344, false}}) {
        for (const bool padded : {false, true}) {
            SCOPED_TRACE(std::to_string(sizes.samples) + " x " + std::to_string(sizes.tokens) +
                         (padded ? ", padded" : ""));
            const LlamaCase block(sizes, padded), exact = block.to(at::kDouble);
            const at::Tensor out = block.fused(), expected = exact.by_operators();
            ASSERT_TRUE(is_fast(out));
            EXPECT_LE(relative_difference(out, expected), tolerance);
            scalar_of(out).backward();
            scalar_of(expected).backward();
            expect_same_gradients(block, exact);
        }
    }
}

TEST(LlamaBlock, AddsToGradientsWhereTheyAreInAScope) {
    at::manual_seed(2);
    const LlamaCase block({2, 9, 16, 4, 2, 6, 20, true}), exact = block.to(at::kDouble);
    const InPlaceGradients scope;
    std::vector<const void*> places;
    scalar_of(block.fused()).backward();
    for (const at::Tensor& one : block.weights) places.push_back(one.grad().const_data_ptr());
    scalar_of(block.fused()).backward();
    for (int i = 0; i < 2; ++i) scalar_of(exact.by_operators()).backward();
    for (std::size_t i = 0; i < places.size(); ++i) EXPECT_EQ(block.weights[i].grad().const_data_ptr(), places[i]) << i;
    expect_same_gradients(block, exact);
}

TEST(LlamaBlock, GivesNothingToWhatIsFrozen) {
    at::manual_seed(3);
    for (std::size_t frozen = 0; frozen < 12; ++frozen) {
        const LlamaCase block({2, 9, 16, 4, 2, 6, 20, true}), all = block.to(at::kFloat);
        block.weights[frozen].requires_grad_(false);
        scalar_of(block.fused()).backward();
        scalar_of(all.fused()).backward();
        for (std::size_t i = 0; i < 12; ++i) {
            ASSERT_EQ(block.weights[i].grad().defined(), i != frozen);
            if (i != frozen) {
                EXPECT_TRUE(same_bits(block.weights[i].grad(), all.weights[i].grad()));
            }
        }
    }
}

TEST(LlamaBlock, CanBeDifferentiatedTwice) {
    at::manual_seed(4);
    const LlamaCase block({2, 5, 8, 2, 1, 4, 12, false}), exact = block.to(at::kDouble);
    const auto twice = [](const at::Tensor& out, const LlamaCase& of) {
        std::vector<at::Tensor> inputs = of.weights;
        inputs.push_back(of.x);
        at::Tensor norm = at::zeros({}, out.options());
        for (const at::Tensor& one : torch::autograd::grad({scalar_of(out)}, inputs, {}, std::nullopt, true)) {
            norm = norm + one.square().sum();
        }
        return torch::autograd::grad({norm}, inputs);
    };
    const auto ours = twice(block.fused(), block), expected = twice(exact.by_operators(), exact);
    for (std::size_t i = 0; i < ours.size(); ++i) {
        EXPECT_LE(relative_difference(ours[i], expected[i]), 2e-5) << i;  // of gradients known to 3e-6
    }
}

TEST(LlamaBlock, IsTheSameOnTwoThreads) {
    at::manual_seed(5);
    const LlamaCase block({3, 50, 64, 4, 2, 16, 100, false}), other = block.to(at::kFloat),
                                                              again = block.to(at::kFloat);
    scalar_of(block.fused()).backward();
    at::set_num_threads(2);
    scalar_of(other.fused()).backward();
    scalar_of(again.fused()).backward();
    at::set_num_threads(1);
    expect_same_gradients(other, block);
    for (std::size_t i = 0; i < other.weights.size(); ++i) {
        EXPECT_TRUE(same_bits(other.weights[i].grad(), again.weights[i].grad())) << i;
    }
}

TEST(LlamaBlock, TakesPositionsOfEachSample) {
    at::manual_seed(6);
    LlamaCase block({3, 7, 16, 4, 2, 6, 20, false});
    block.cosines = at::randn({3, 7, 6});
    block.sines = at::randn({3, 7, 6});
    const LlamaCase exact = block.to(at::kDouble);
    EXPECT_LE(relative_difference(block.fused(), exact.by_operators()), tolerance);
}

TEST(LlamaBlock, RefusesMismatchedInputs) {
    LlamaCase block({2, 9, 16, 4, 2, 6, 20, false});
    block.lengths = at::tensor({9, 10}, at::kLong);
    EXPECT_THROW(block.fused(), Error);
    block.lengths = at::Tensor();
    std::swap(block.weights[6], block.weights[8]);
    EXPECT_ANY_THROW(block.fused());
}

}  // namespace
