#include "microbatch/ops/causal_attention.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "microbatch/memory/budget_allocator.h"
#include "support/errors.h"

namespace microbatch {
namespace {

using test::expect_usage_error;

/// By torch's operators one by one, which know double and second derivatives.
at::Tensor by_formula(const at::Tensor& qkv, std::int64_t heads) {
    const auto parts = qkv.view({qkv.size(0), qkv.size(1), 3, heads, qkv.size(2) / 3 / heads}).unbind(2);
    const auto by_head = [&](std::size_t i) { return parts[i].transpose(1, 2); };
    const at::Tensor scores = by_head(0).matmul(by_head(1).transpose(2, 3)) / std::sqrt(double(parts[0].size(3)));
    const at::Tensor later = at::ones_like(scores).triu(1).to(at::kBool);
    const at::Tensor p = scores.masked_fill(later, -std::numeric_limits<double>::infinity()).softmax(3);
    return p.matmul(by_head(2)).transpose(1, 2).flatten(2);
}

void expect_close(const at::Tensor& ours, const at::Tensor& expected, double tolerance) {
    EXPECT_LE((ours.to(at::kDouble) - expected).abs().max().item<double>(), tolerance);
}

TEST(CausalAttention, EqualsTheFormulaForSamplesAndHeads) {
    at::manual_seed(1);
    const std::vector<std::vector<std::int64_t>> shapes = {{1, 1, 1, 4}, {3, 7, 2, 5}, {2, 64, 4, 32}, {1, 130, 3, 64}};
    for (const auto& shape : shapes) {
        const std::int64_t heads = shape[2];
        const at::Tensor ours = at::randn({shape[0], shape[1], 3 * heads * shape[3]}).requires_grad_();
        const at::Tensor theirs = ours.detach().to(at::kDouble).requires_grad_();
        const at::Tensor out = causal_attention(ours, heads), expected = by_formula(theirs, heads);
        const at::Tensor gradient = at::randn_like(out);
        out.backward(gradient);
        expected.backward(gradient.to(at::kDouble));
        // As in kernels_test.cpp: fp32 sums of up to 130 numbers about 1.
        expect_close(out, expected, 4e-6);
        expect_close(ours.grad(), theirs.grad(), 2e-5);
    }
}

TEST(CausalAttention, OtherTypesTakeTorchsOwn) {
    at::manual_seed(2);
    const at::Tensor x = at::randn({2, 9, 24}, at::kDouble).requires_grad_();
    const at::Tensor y = x.detach().clone().requires_grad_();
    causal_attention(x, 2).sum().backward();
    by_formula(y, 2).sum().backward();
    expect_close(x.grad(), y.grad(), 1e-13);  // the same sums in fp64
}

TEST(CausalAttention, IsDifferentiableTwice) {
    at::manual_seed(3);
    const at::Tensor ours = at::randn({2, 11, 30}).requires_grad_();
    const at::Tensor theirs = ours.detach().to(at::kDouble).requires_grad_();
    const auto second = [](const at::Tensor& x, const at::Tensor& out) {
        const auto first = torch::autograd::grad({(out * out).sum()}, {x}, {}, true, /*create_graph=*/true);
        return torch::autograd::grad({(first[0] * first[0]).sum()}, {x})[0];
    };
    const at::Tensor expected = second(theirs, by_formula(theirs, 2));
    // Products of three and more numbers about 1, of a size that the result's tells.
    expect_close(second(ours, causal_attention(ours, 2)), expected, 1e-5 * expected.abs().max().item<double>());
}

TEST(CausalAttention, EverySampleIsTheSameAloneAndOnEveryNumberOfThreads) {
    at::manual_seed(4);
    const at::Tensor qkv = at::randn({5, 33, 48});
    const at::Tensor together = causal_attention(qkv, 2);
    for (std::int64_t i = 0; i < 5; ++i) {
        EXPECT_TRUE(at::equal(causal_attention(qkv.slice(0, i, i + 1), 2), together.slice(0, i, i + 1)));
    }
    const int threads = at::get_num_threads();
    at::set_num_threads(1);
    EXPECT_TRUE(at::equal(causal_attention(qkv, 2), together));
    at::set_num_threads(threads);
}

TEST(CausalAttention, AcceptsTransposedAndEmptyInputs) {
    at::manual_seed(5);
    const at::Tensor turned = at::randn({24, 9, 2}).permute({2, 1, 0}).requires_grad_();
    const at::Tensor straight = turned.detach().contiguous().requires_grad_();
    causal_attention(turned, 4).sum().backward();
    causal_attention(straight, 4).sum().backward();
    EXPECT_TRUE(at::equal(turned.grad(), straight.grad()));
    EXPECT_EQ(causal_attention(at::empty({0, 9, 24}), 4).sizes(), (std::vector<std::int64_t>{0, 9, 8}));
}

TEST(CausalAttention, KeepsNoProbabilities) {
    install_budget_allocator();
    const std::int64_t tokens = 512, width = 64;
    const at::Tensor qkv = at::randn({1, tokens, 3 * width}).requires_grad_();
    const std::int64_t before = memory_use().live_bytes;
    const at::Tensor out = causal_attention(qkv, 4);
    const std::int64_t numbers = tokens * width + 4 * tokens;  // out and the log sums
    EXPECT_LE(memory_use().live_bytes - before, numbers * 4 + 256);
}

TEST(CausalAttention, RefusesOtherShapes) {
    expect_usage_error({"[2, 24]", "heads"}, [] { causal_attention(at::zeros({2, 24}), 2); });
    expect_usage_error({"[1, 2, 25]"}, [] { causal_attention(at::zeros({1, 2, 25}), 2); });
    expect_usage_error({"0 heads"}, [] { causal_attention(at::zeros({1, 2, 24}), 0); });
    expect_usage_error({"undefined"}, [] { causal_attention(at::Tensor(), 2); });
    expect_usage_error({"Long"}, [] { causal_attention(at::zeros({1, 2, 24}, at::kLong), 2); });
}

/// Attention of tensors of their own by torch's operators, with a mask.
at::Tensor by_formula_of(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, std::int64_t heads,
                         std::int64_t kv_heads, bool causal, const at::Tensor& lengths) {
    const std::int64_t tokens = q.size(1), size = q.size(2) / heads;
    const auto by_head = [&](const at::Tensor& x, std::int64_t count) {
        const at::Tensor apart = x.view({x.size(0), tokens, count, size}).transpose(1, 2);
        return apart.repeat_interleave(heads / count, 1);
    };
    at::Tensor open = at::ones({q.size(0), 1, tokens, tokens}, at::kBool);
    if (causal) open = open.tril();
    if (lengths.defined()) open = open & at::arange(tokens).lt(lengths.view({-1, 1, 1, 1}));
    const at::Tensor scores = by_head(q, heads).matmul(by_head(k, kv_heads).transpose(2, 3)) / std::sqrt(double(size));
    const at::Tensor p = scores.masked_fill(~open, -std::numeric_limits<double>::infinity()).softmax(3);
    return p.matmul(by_head(v, kv_heads)).transpose(1, 2).flatten(2);
}

TEST(Attention, OfSharedKeysAndOfPaddingEqualsTheFormula) {
    at::manual_seed(6);
    for (const bool causal : {true, false}) {
        for (const bool padded : {true, false}) {
            for (const std::int64_t kv_heads : {1, 2, 4}) {
                const at::Tensor lengths = padded ? at::tensor({1, 9, 13}, at::kLong) : at::Tensor();
                std::vector<at::Tensor> ours, theirs;
                for (const std::int64_t heads : {std::int64_t{4}, kv_heads, kv_heads}) {
                    ours.push_back(at::randn({3, 13, heads * 10}).requires_grad_());
                    theirs.push_back(ours.back().detach().to(at::kDouble).requires_grad_());
                }
                const at::Tensor out = attention(ours[0], ours[1], ours[2], 4, kv_heads, causal, lengths);
                const at::Tensor expected =
                    by_formula_of(theirs[0], theirs[1], theirs[2], 4, kv_heads, causal, lengths);
                EXPECT_NE(out.grad_fn()->name().find("FusedAttention"), std::string::npos);
                const at::Tensor gradient = at::randn_like(out);
                out.backward(gradient);
                expected.backward(gradient.to(at::kDouble));
                expect_close(out, expected, 4e-6);  // as above
                for (std::size_t i = 0; i < 3; ++i) expect_close(ours[i].grad(), theirs[i].grad(), 2e-5);
                const at::Tensor in_double = attention(theirs[0], theirs[1], theirs[2], 4, kv_heads, causal, lengths);
                expect_close(in_double, expected, 1e-13);  // the same sums in fp64
            }
        }
    }
}

TEST(Attention, OfPaddingIsDifferentiableTwice) {
    at::manual_seed(7);
    const at::Tensor lengths = at::tensor({3, 7}, at::kLong);
    const at::Tensor ours = at::randn({2, 7, 12}).requires_grad_(),
                     theirs = ours.detach().to(at::kDouble).requires_grad_();
    const auto second = [](const at::Tensor& x, const at::Tensor& out) {
        const auto first = torch::autograd::grad({(out * out).sum()}, {x}, {}, true, /*create_graph=*/true);
        return torch::autograd::grad({(first[0] * first[0]).sum()}, {x})[0];
    };
    const at::Tensor expected = second(theirs, by_formula_of(theirs, theirs, theirs, 3, 3, true, lengths));
    EXPECT_LE((second(ours, attention(ours, ours, ours, 3, 3, true, lengths)).to(at::kDouble) - expected)
                  .abs()
                  .max()
                  .item<double>(),
              1e-5 * expected.abs().max().item<double>());  // as above
}

TEST(Attention, RefusesLengthsThatAreNone) {
    const at::Tensor x = at::randn({2, 7, 12});
    for (const at::Tensor& lengths : {at::tensor({0, 7}, at::kLong), at::tensor({3, 8}, at::kLong),
                                      at::tensor({3}, at::kLong), at::tensor({3, 7}, at::kInt)}) {
        expect_usage_error({"length"}, [&] { attention(x, x, x, 3, 3, true, lengths); });
    }
    expect_usage_error({"heads"}, [&] { attention(x, x, x, 3, 2, true); });
}

}  // namespace
}  // namespace microbatch
