#include "microbatch/data/tokens.h"

#include <gtest/gtest.h>

#include <random>
#include <string>
#include <utility>
#include <vector>

#include "microbatch/core/crc32c.h"
#include "support/errors.h"

namespace microbatch {
namespace {

using test::expect_usage_error;

Tokens two_byte_tokens(std::vector<std::uint16_t> values) {
    const auto owner = std::make_shared<const std::vector<std::uint16_t>>(std::move(values));
    return {std::span<const std::uint16_t>(*owner), owner};
}

TEST(Tokens, SlicesShareTheStorageAndKeepItAlive) {
    Tokens all = byte_tokens({0, 1, 2, 3, 4});
    const std::weak_ptr<const void> storage = all.owner;
    const auto* third = std::get<0>(all.values).data() + 2;
    {
        const Tokens part = all.slice(2, 5);
        all = {};
        EXPECT_EQ(std::get<0>(part.values).data(), third);
        EXPECT_EQ(part.size(), 3);
        EXPECT_EQ(std::get<0>(part.values).back(), 4);
        EXPECT_FALSE(storage.expired());
    }
    EXPECT_TRUE(storage.expired());
}

TEST(Tokens, RefusesASliceOutOfRange) {
    const Tokens tokens = two_byte_tokens({1, 2, 3});
    EXPECT_EQ(tokens.slice(3, 3).size(), 0);
    for (const auto& [begin, end] : {std::pair{-1, 2}, std::pair{2, 1}, std::pair{0, 4}, std::pair{4, 4}}) {
        expect_usage_error({"the 3 tokens"}, [&, b = begin, e = end] { tokens.slice(b, e); });
    }
}

TEST(Tokens, VocabularyIsTheLargestTokenPlusOne) {
    EXPECT_EQ(scan(byte_tokens({})).vocabulary, 0);
    EXPECT_EQ(scan(byte_tokens({0})).vocabulary, 1);
    EXPECT_EQ(scan(byte_tokens({3, 255, 7})).vocabulary, 256);
    EXPECT_EQ(scan(two_byte_tokens({65535, 1})).vocabulary, 65536);
    EXPECT_EQ(scan(two_byte_tokens({4, 5, 50256})).vocabulary, 50257);
}

TEST(Tokens, AreSeenByEvenAndOddPlacesOverSeveralParts) {
    const TokenScan first = scan(two_byte_tokens({7, 8, 9}));
    const TokenScan all = scan(two_byte_tokens({300, 65535}), first);
    EXPECT_EQ(first.count, 3);
    EXPECT_EQ(all.count, 5);
    EXPECT_EQ(all.vocabulary, 65536);
    for (std::size_t token = 0; token < TokenScan::values; ++token) {
        const bool even = token == 7 || token == 9 || token == 65535, odd = token == 8 || token == 300;
        ASSERT_EQ(all.seen[0][token], even) << token;
        ASSERT_EQ(all.seen[1][token], odd) << token;
    }
    const TokenScan at_once = scan(two_byte_tokens({7, 8, 9, 300, 65535}));
    EXPECT_EQ(at_once.checksum, all.checksum);
    EXPECT_EQ(at_once.seen, all.seen);
}

TEST(Tokens, ChecksumIsThatOfTheBytesTheyAreStoredAs) {
    EXPECT_EQ(scan(byte_tokens({})).checksum, 0U);
    EXPECT_EQ(scan(byte_tokens({'a', 'b', 'c'})).checksum, crc32c("abc"));
    EXPECT_EQ(scan(two_byte_tokens({0x6261, 0x6463})).checksum, crc32c("abcd"));
    std::string bytes(1'300'000, '\0');  // several parts
    std::mt19937 random(6);
    for (char& byte : bytes) byte = static_cast<char>(random());
    EXPECT_EQ(scan(byte_tokens({bytes.begin(), bytes.end()})).checksum, crc32c(bytes));
}

}  // namespace
}  // namespace microbatch
