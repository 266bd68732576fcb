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

/// Little-endian uint16 tokens of an open file, read when they are asked for: what a span is to tokens in memory.
struct TokensInFile {
    const InputFile* file = nullptr;
    std::uint64_t offset = 0;  ///< of the first token, in bytes
    std::size_t count = 0;     ///< tokens

    std::size_t size() const { return count; }
    TokensInFile subspan(std::size_t begin, std::size_t length) const {
        return {file, offset + begin * sizeof(std::uint16_t), length};
    }
};

/// Tokens of one byte (text) or two (in memory or in a file), together with what keeps them alive. Copies share them.
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

/// The tokens of a file of little-endian uint16 tokens: as nanoGPT writes them (nothing else in the file) or as llm.c
/// does (a header of 256 int32: 20240520, version 1, the number of tokens).
///
/// Errors: ErrorKind::bad_data if the file cannot be opened (see InputFile), is empty, has half a token at its end, or
///         has a header of llm.c that is cut off, disagrees with the file's size, is of another version, or announces
///         uint32 tokens (20240801); if it has no header and looks like text or another format (see format_of).
/// State:  only the header is read; the file stays open, even if it is removed, as long as a copy of the tokens lives.
Tokens open_token_file(const std::filesystem::path& path);

/// What one pass over tokens finds.
struct TokenScan {
    static constexpr std::size_t values = 65536;

    std::int64_t count = 0;
    std::int64_t vocabulary = 0;  ///< largest token + 1, the least that a model of them can have; 0 if there are none
    std::uint32_t checksum = 0;   ///< CRC-32C of the bytes that they are stored as
    std::array<std::vector<std::uint8_t>, 2> seen{std::vector<std::uint8_t>(values),
                                                  std::vector<std::uint8_t>(values)};  ///< [place % 2][token] is 0 or 1
};

/// What `before` found and the tokens after those add to it.
/// Errors: as InputFile::read, if the tokens are in a file.
/// Cost:   one pass; of a file, 1 MiB is in memory at a time.
TokenScan scan(const Tokens& tokens, TokenScan before = {});

/// Holds what was read of a file, so that the next part needs no memory of its own.
using TokenBuffer = std::vector<std::uint16_t>;

/// `count` tokens from `begin` on: where they are, or in the buffer if they are in a file. Requires: they are within.
/// Errors: as InputFile::read, if the tokens are in a file.
template <class Value>
std::span<const Value> tokens_at(std::span<const Value> all, std::size_t begin, std::size_t count, TokenBuffer&) {
    return all.subspan(begin, count);
}
std::span<const std::uint16_t> tokens_at(const TokensInFile& all, std::size_t begin, std::size_t count,
                                         TokenBuffer& buffer);

}  // namespace microbatch
