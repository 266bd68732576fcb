#include "microbatch/data/tokens.h"

#include <algorithm>
#include <bit>
#include <string_view>
#include <utility>

#include "microbatch/core/crc32c.h"
#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"

namespace microbatch {
namespace {

static_assert(std::endian::native == std::endian::little, "token files are read as they are and are little-endian");

constexpr std::size_t scanned_tokens = std::size_t{1} << 19;

template <class Value>
void add_to(TokenScan& found, std::span<const Value> tokens) {
    std::uint8_t* here = found.seen[static_cast<std::size_t>(found.count % 2)].data();
    std::uint8_t* next = found.seen[static_cast<std::size_t>((found.count + 1) % 2)].data();
    for (std::size_t i = 0; i + 1 < tokens.size(); i += 2) {
        here[tokens[i]] = 1;
        next[tokens[i + 1]] = 1;
    }
    if (tokens.size() % 2 == 1) here[tokens.back()] = 1;
    found.count += static_cast<std::int64_t>(tokens.size());
    const std::string_view bytes(reinterpret_cast<const char*>(tokens.data()), tokens.size_bytes());
    found.checksum = crc32c(bytes, found.checksum);
}

}  // namespace

std::int64_t Tokens::size() const {
    return std::visit([](const auto& all) { return static_cast<std::int64_t>(all.size()); }, values);
}

Tokens Tokens::slice(std::int64_t begin, std::int64_t end) const {
    if (begin < 0 || begin > end || end > size()) {
        throw Error(ErrorKind::usage, str_cat("tokens [", begin, ", ", end, ") are outside the ", size(), " tokens"));
    }
    const auto part = [&](const auto& all) -> decltype(values) {
        return all.subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(end - begin));
    };
    return {std::visit(part, values), owner};
}

Tokens byte_tokens(std::vector<std::uint8_t> bytes) {
    const auto owner = std::make_shared<const std::vector<std::uint8_t>>(std::move(bytes));
    return {std::span<const std::uint8_t>(*owner), owner};
}

TokenScan scan(const Tokens& tokens, TokenScan found) {
    TokenBuffer buffer;
    const auto look_at = [&](const auto& all) {
        for (std::size_t begin = 0; begin < all.size(); begin += scanned_tokens) {
            add_to(found, tokens_at(all, begin, std::min(scanned_tokens, all.size() - begin), buffer));
        }
    };
    std::visit(look_at, tokens.values);
    for (std::size_t token = 0; token < TokenScan::values; ++token) {
        if (found.seen[0][token] + found.seen[1][token] > 0) found.vocabulary = static_cast<std::int64_t>(token) + 1;
    }
    return found;
}

std::span<const std::uint16_t> tokens_at(const TokensInFile& all, std::size_t begin, std::size_t count,
                                         TokenBuffer& buffer) {
    buffer.resize(count);
    all.file->read(all.subspan(begin, count).offset, std::as_writable_bytes(std::span(buffer)));
    return buffer;
}

}  // namespace microbatch
