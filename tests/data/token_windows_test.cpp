#include "microbatch/data/token_windows.h"

#include <gtest/gtest.h>

#include <limits>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>

#include "data/elements.h"
#include "support/errors.h"

namespace microbatch {
namespace {

using test::elements;
using test::expect_error;
using test::expect_usage_error;
using Indices = std::vector<std::int64_t>;

Tokens two_byte_tokens(std::vector<std::uint16_t> values) {
    const auto owner = std::make_shared<const std::vector<std::uint16_t>>(std::move(values));
    return {std::span<const std::uint16_t>(*owner), owner};
}

TEST(TokenWindows, TargetsAreTheNextTokens) {
    const TokenWindows windows(byte_tokens({10, 11, 12, 13, 14, 15, 16}), 3);
    EXPECT_EQ(windows.size(), 2);
    EXPECT_EQ(windows.tokens_per_sample(), 3);
    const Batch batch = windows.get(Indices{1, 0, 1});
    ASSERT_EQ(batch.fields.size(), 2U);
    EXPECT_EQ(batch.fields[0].sizes(), (std::vector<std::int64_t>{3, 3}));
    EXPECT_EQ(batch.fields[1].sizes(), (std::vector<std::int64_t>{3, 3}));
    EXPECT_EQ(elements<std::int64_t>(batch.fields[0]), (Indices{13, 14, 15, 10, 11, 12, 13, 14, 15}));
    EXPECT_EQ(elements<std::int64_t>(batch.fields[1]), (Indices{14, 15, 16, 11, 12, 13, 14, 15, 16}));
}

TEST(TokenWindows, EverySampleOfRandomTokensIsItsWindow) {
    std::mt19937 random(1);
    for (int round = 0; round < 200; ++round) {
        const auto length = std::int64_t{1} + random() % 9;
        const auto count = length + 1 + random() % 60;
        std::vector<std::uint16_t> values(static_cast<std::size_t>(count));
        for (auto& value : values) value = static_cast<std::uint16_t>(random());
        const TokenWindows windows(two_byte_tokens(values), length);
        ASSERT_EQ(windows.size(), (count - 1) / length);
        Indices all(static_cast<std::size_t>(windows.size()));
        std::iota(all.begin(), all.end(), 0);
        const Batch batch = windows.get(all);
        // All windows in order are the tokens in order, and the targets the same one later.
        const auto used = windows.size() * length;
        ASSERT_EQ(elements<std::int64_t>(batch.fields[0]), Indices(values.begin(), values.begin() + used));
        ASSERT_EQ(elements<std::int64_t>(batch.fields[1]), Indices(values.begin() + 1, values.begin() + 1 + used));
    }
}

TEST(TokenWindows, LargestTokensStayPositive) {
    const Batch bytes = TokenWindows(byte_tokens({255, 128}), 1).get(Indices{0});
    EXPECT_EQ(elements<std::int64_t>(bytes.fields[0]), Indices{255});
    EXPECT_EQ(elements<std::int64_t>(bytes.fields[1]), Indices{128});
    const Batch words = TokenWindows(two_byte_tokens({65535, 32768}), 1).get(Indices{0});
    EXPECT_EQ(elements<std::int64_t>(words.fields[0]), Indices{65535});
    EXPECT_EQ(elements<std::int64_t>(words.fields[1]), Indices{32768});
}

TEST(TokenWindows, NoIndicesGiveAnEmptyBatch) {
    const Batch batch = TokenWindows(byte_tokens({1, 2, 3}), 2).get({});
    EXPECT_EQ(batch.fields[0].sizes(), (std::vector<std::int64_t>{0, 2}));
    EXPECT_EQ(batch.fields[1].sizes(), (std::vector<std::int64_t>{0, 2}));
}

TEST(TokenWindows, RefusesAnIndexOutsideTheDataset) {
    const TokenWindows windows(byte_tokens({1, 2, 3, 4}), 2);
    EXPECT_EQ(windows.size(), 1);
    EXPECT_THROW(windows.get(Indices{1}), std::out_of_range);
    EXPECT_THROW(windows.get(Indices{-1}), std::out_of_range);
}

TEST(TokenWindows, NeedsOneTokenMoreThanASample) {
    EXPECT_EQ(TokenWindows(byte_tokens({1, 2, 3, 4}), 3).size(), 1);
    expect_error(ErrorKind::bad_data, {"3 tokens", "needs 4"}, [] { TokenWindows(byte_tokens({1, 2, 3}), 3); });
    expect_error(ErrorKind::bad_data, {"0 tokens", "needs 65"}, [] { TokenWindows(byte_tokens({}), 64); });
    expect_error(ErrorKind::bad_data, {"1 tokens", "needs 9223372036854775808"},
                 [] { TokenWindows(byte_tokens({1}), std::numeric_limits<std::int64_t>::max()); });
}

TEST(TokenWindows, RefusesALengthBelowOne) {
    for (const std::int64_t length : {std::int64_t{0}, std::int64_t{-5}, std::numeric_limits<std::int64_t>::min()}) {
        expect_usage_error({std::to_string(length)}, [&] { TokenWindows(byte_tokens({1, 2}), length); });
    }
}

}  // namespace
}  // namespace microbatch
