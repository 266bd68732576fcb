#include "microbatch/data/token_windows.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstddef>
#include <stdexcept>
#include <utility>

#include "microbatch/core/error.h"
#include "microbatch/core/text.h"

namespace microbatch {

std::int64_t Tokens::size() const {
    return std::visit([](const auto& span) { return static_cast<std::int64_t>(span.size()); }, values);
}

Tokens Tokens::slice(std::int64_t begin, std::int64_t end) const {
    if (begin < 0 || begin > end || end > size()) {
        throw Error(ErrorKind::usage,
                    text("tokens [", begin, ", ", end, ") are not within the ", size(), " there are"));
    }
    const auto part = [&](const auto& span) -> decltype(values) {
        return span.subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(end - begin));
    };
    return {std::visit(part, values), owner};
}

Tokens byte_tokens(std::vector<std::uint8_t> bytes) {
    const auto owner = std::make_shared<const std::vector<std::uint8_t>>(std::move(bytes));
    return {std::span<const std::uint8_t>(*owner), owner};
}

std::int64_t vocabulary_of(const Tokens& tokens) {
    const auto largest_plus_one = [](const auto& span) -> std::int64_t {
        if (span.empty()) return 0;
        auto largest = span[0];
        for (const auto token : span) largest = std::max(largest, token);
        return std::int64_t{largest} + 1;
    };
    return std::visit(largest_plus_one, tokens.values);
}

TokenWindows::TokenWindows(Tokens tokens, std::int64_t length) : tokens_(std::move(tokens)), length_(length) {
    if (length < 1) throw Error(ErrorKind::usage, text("a sample has ", length, " tokens: it needs at least 1"));
    if (tokens_.size() <= length) {
        throw Error(ErrorKind::bad_data, text("there are ", tokens_.size(), " tokens, but one sample of ", length,
                                              " needs ", static_cast<std::uint64_t>(length) + 1,
                                              " (its last target is the token after it): "
                                              "give more data or use shorter samples"));
    }
}

std::int64_t TokenWindows::size() const {
    return (tokens_.size() - 1) / length_;
}

Batch TokenWindows::get(std::span<const std::int64_t> indices) const {
    const auto count = static_cast<std::int64_t>(indices.size());
    const at::Tensor inputs = at::empty({count, length_}, at::kLong);
    const at::Tensor targets = at::empty({count, length_}, at::kLong);
    auto* input = inputs.mutable_data_ptr<std::int64_t>();
    auto* target = targets.mutable_data_ptr<std::int64_t>();
    for (const std::int64_t index : indices) {
        if (index < 0 || index >= size()) {
            throw std::out_of_range(text("sample ", index, " of a dataset with ", size(), " samples"));
        }
        const auto copy = [&](const auto& span) {
            const auto* window = span.data() + index * length_;
            input = std::copy_n(window, length_, input);
            target = std::copy_n(window + 1, length_, target);
        };
        std::visit(copy, tokens_.values);
    }
    return {{inputs, targets}};
}

}  // namespace microbatch
