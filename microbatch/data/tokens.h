#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <variant>
#include <vector>

#include "microbatch/io/input_file.h"

namespace microbatch {

/// Little-endian uint16 tokens of an open file, read on demand: like a span for tokens in memory.
struct TokensInFile {
    const InputFile* file = nullptr;
    std::uint64_t offset = 0;  ///< of the first token, in bytes
    std::size_t count = 0;     ///< tokens

    std::size_t size() const { return count; }
    TokensInFile subspan(std::size_t begin, std::size_t length) const {
        return {file, offset + begin * sizeof(std::uint16_t), length};
    }
};

/// Tokens of one byte (text) or two (in memory or in a file), and their storage. Copies share it.
struct Tokens {
    std::variant<std::span<const std::uint8_t>, std::span<const std::uint16_t>, TokensInFile> values;
    std::shared_ptr<const void> owner;

    std::int64_t size() const;

    /// Tokens [begin, end), sharing the storage.
    /// Errors: ErrorKind::usage unless 0 <= begin <= end <= size().
    Tokens slice(std::int64_t begin, std::int64_t end) const;
};

/// Each byte as one token.
Tokens byte_tokens(std::vector<std::uint8_t> bytes);

/// The tokens of a file of little-endian uint16 tokens: as written by nanoGPT (only tokens) or by llm.c (with a header
/// of 256 int32: 20240520, version 1, the number of tokens).
///
/// Errors: ErrorKind::bad_data if the file cannot be opened (see InputFile), is empty, ends with half a token, has an
///         llm.c header that is truncated, contradicts the file's size, has another version, or claims uint32 tokens
///         (20240801); or if it has no header and looks like text or another format (see format_of).
/// State:  only the header is read; the file stays open, even if it is deleted, while a copy of the tokens exists.
Tokens open_token_file(const std::filesystem::path& path);

/// The result of one pass over tokens.
struct TokenScan {
    static constexpr std::size_t values = 65536;

    std::int64_t count = 0;
    std::int64_t vocabulary = 0;  ///< largest token + 1, the smallest vocabulary for a model; 0 if there are none
    std::uint32_t checksum = 0;   ///< CRC-32C of the bytes in which they are stored
    std::array<std::vector<std::uint8_t>, 2> seen{std::vector<std::uint8_t>(values),
                                                  std::vector<std::uint8_t>(values)};  ///< [place % 2][token] is 0 or 1
};

/// Adds the tokens to what was found `before`.
/// Errors: as InputFile::read, if the tokens are in a file.
/// Cost:   one pass; of a file, 1 MiB is in memory at a time.
TokenScan scan(const Tokens& tokens, TokenScan before = {});

/// A buffer for reading a file, reused from part to part.
using TokenBuffer = std::vector<std::uint16_t>;

/// `count` tokens from `begin` on: in place, or in the buffer if they are in a file. Requires: they are within range.
/// Errors: as InputFile::read, if the tokens are in a file.
template <class Value>
std::span<const Value> tokens_at(std::span<const Value> all, std::size_t begin, std::size_t count, TokenBuffer&) {
    return all.subspan(begin, count);
}
std::span<const std::uint16_t> tokens_at(const TokensInFile& all, std::size_t begin, std::size_t count,
                                         TokenBuffer& buffer);

}  // namespace microbatch
