#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <variant>
#include <vector>

#include "microbatch/train/dataset.h"

namespace microbatch {

/// Tokens of one byte (text) or two (a token file), together with what keeps them alive. Copies share the tokens.
struct Tokens {
    std::variant<std::span<const std::uint8_t>, std::span<const std::uint16_t>> values;
    std::shared_ptr<const void> owner;

    std::int64_t size() const;

    /// Tokens [begin, end), sharing the storage.
    /// Errors: ErrorKind::usage unless 0 <= begin <= end <= size().
    Tokens slice(std::int64_t begin, std::int64_t end) const;
};

/// Each byte as one token.
Tokens byte_tokens(std::vector<std::uint8_t> bytes);

/// The largest token + 1: the smallest vocabulary a model of these tokens can have. 0 if there are no tokens.
/// Cost: one pass over the tokens; a mapped file is read from the disk.
std::int64_t vocabulary_of(const Tokens& tokens);

/// Consecutive windows of a token sequence, for next-token prediction: sample i is tokens [i*length, i*length + length]
/// (both ends included), so a window's last target is the next window's first input.
///
/// Shapes: get() gives two int64 fields, inputs [b, length] and targets [b, length], targets one token later.
/// Errors: the constructor throws ErrorKind::usage if length < 1, ErrorKind::bad_data if there are not more than
///         `length` tokens; get() throws std::out_of_range.
class TokenWindows final : public Dataset {
public:
    /// length: tokens per sample.
    TokenWindows(Tokens tokens, std::int64_t length);

    /// (tokens - 1) / length; up to length - 1 tokens at the end, less than a window, are not used.
    std::int64_t size() const override;
    std::int64_t tokens_per_sample() const override { return length_; }
    Batch get(std::span<const std::int64_t> indices) const override;

private:
    Tokens tokens_;
    std::int64_t length_;
};

}  // namespace microbatch
