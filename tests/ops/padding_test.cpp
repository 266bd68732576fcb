#include "microbatch/ops/padding.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <limits>

namespace microbatch {
namespace {

/// [samples, 1, tokens, tokens], true where a token attends.
at::Tensor mask_of(const at::Tensor& lengths, std::int64_t tokens, bool causal) {
    const at::Tensor keys = at::arange(tokens).lt(lengths.view({-1, 1, 1, 1}));
    const at::Tensor mask = keys.expand({lengths.size(0), 1, tokens, tokens});
    return causal ? mask.tril() : mask;
}

at::Tensor added(const at::Tensor& mask) {
    return at::zeros(mask.sizes()).masked_fill(~mask, std::numeric_limits<float>::lowest());
}

TEST(PaddingLengths, AreThoseOfAMaskOfPaddingAtTheEnd) {
    const at::Tensor lengths = at::tensor({1, 4, 6}, at::kLong);
    for (const bool causal : {true, false}) {
        const at::Tensor mask = mask_of(lengths, 6, causal);
        EXPECT_TRUE(at::equal(padding_lengths(mask, causal), lengths));
        EXPECT_TRUE(at::equal(padding_lengths(added(mask), causal), lengths));
        EXPECT_TRUE(at::equal(padding_lengths(mask.transpose(2, 3).contiguous().transpose(2, 3), causal), lengths));
        EXPECT_FALSE(padding_lengths(mask, !causal).defined());
    }
}

TEST(PaddingLengths, AreUndefinedForEveryOtherMask) {
    // With a length of 5 or 6, one more or less would be another length.
    const at::Tensor lengths = at::tensor({3, 4}, at::kLong);
    for (const bool causal : {true, false}) {
        const at::Tensor mask = mask_of(lengths, 6, causal).clone();
        for (std::int64_t i = 0; i < mask.numel(); ++i) {
            at::Tensor other = mask.clone();
            at::Tensor one = other.view(-1)[i];
            one.logical_not_();
            EXPECT_FALSE(padding_lengths(other, causal).defined()) << i;
            at::Tensor numbers = added(mask);
            numbers.view(-1)[i] = -1.0F;
            EXPECT_FALSE(padding_lengths(numbers, causal).defined()) << i;
        }
    }
}

TEST(PaddingLengths, AreUndefinedWhereAllOfASampleIsHidden) {
    EXPECT_FALSE(padding_lengths(mask_of(at::tensor({0, 6}, at::kLong), 6, false), false).defined());
}

TEST(PaddingLengths, AreUndefinedForOtherShapesAndTypes) {
    const at::Tensor mask = mask_of(at::tensor({5, 6}, at::kLong), 6, true);
    EXPECT_FALSE(padding_lengths(mask.squeeze(1), true).defined());
    EXPECT_FALSE(padding_lengths(mask.expand({2, 3, 6, 6}), true).defined());
    EXPECT_FALSE(padding_lengths(mask.narrow(2, 0, 5), true).defined());
    EXPECT_FALSE(padding_lengths(mask.to(at::kLong), true).defined());
    EXPECT_FALSE(padding_lengths({}, true).defined());
}

}  // namespace
}  // namespace microbatch
