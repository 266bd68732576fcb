#pragma once

#include <cstdint>
#include <span>

#include "microbatch/data/dataset.h"
#include "microbatch/data/tokens.h"

namespace microbatch {

/// Consecutive windows of a token sequence, for next-token prediction: sample i is tokens [i*length, i*length + length]
/// (both ends included), so a window's last target is the next window's first input.
///
/// Shapes: get() returns two int64 fields, inputs [b, length] and targets [b, length], with targets one token later.
/// Errors: the constructor throws ErrorKind::usage if length < 1, ErrorKind::bad_data if there are at most `length`
///         tokens; get() throws std::out_of_range, and as InputFile::read if the tokens are in a file.
class TokenWindows final : public Dataset {
public:
    /// length: tokens per sample.
    TokenWindows(Tokens tokens, std::int64_t length);

    /// (tokens - 1) / length; the last tokens, up to length - 1 of them, less than a window, are not used.
    std::int64_t size() const override;
    std::int64_t tokens_per_sample() const override { return length_; }
    Batch get(std::span<const std::int64_t> indices) const override;

private:
    Tokens tokens_;
    std::int64_t length_;
};

}  // namespace microbatch
