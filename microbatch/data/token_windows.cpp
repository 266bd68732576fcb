#include "microbatch/data/token_windows.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstddef>
#include <stdexcept>
#include <utility>
#include <variant>

#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"

namespace microbatch {

TokenWindows::TokenWindows(Tokens tokens, std::int64_t length) : tokens_(std::move(tokens)), length_(length) {
    if (length < 1) throw Error(ErrorKind::usage, "a sample has ", length, " tokens: it needs at least 1");
    if (tokens_.size() <= length) {
        throw Error(ErrorKind::bad_data, "there are ", tokens_.size(), " tokens, but one sample of ", length, " needs ",
                    static_cast<std::uint64_t>(length) + 1,
                    " (its last target is the token after it): give more data or use shorter samples");
    }
}

std::int64_t TokenWindows::size() const {
    return (tokens_.size() - 1) / length_;
}

Batch TokenWindows::get(std::span<const std::int64_t> indices) const {
    const auto count = static_cast<std::int64_t>(indices.size());
    const auto host = at::TensorOptions().dtype(at::kLong).device(at::kCPU);
    const at::Tensor inputs = at::empty({count, length_}, host);
    const at::Tensor targets = at::empty({count, length_}, host);
    auto* input = inputs.mutable_data_ptr<std::int64_t>();
    auto* target = targets.mutable_data_ptr<std::int64_t>();
    const auto length = static_cast<std::size_t>(length_);
    TokenBuffer buffer;
    for (const std::int64_t index : indices) {
        if (index < 0 || index >= size()) {
            throw std::out_of_range(str_cat("sample ", index, " of a dataset with ", size(), " samples"));
        }
        const auto copy = [&](const auto& all) {
            const auto window = tokens_at(all, static_cast<std::size_t>(index) * length, length + 1, buffer);
            input = std::copy_n(window.data(), length, input);
            target = std::copy_n(window.data() + 1, length, target);
        };
        std::visit(copy, tokens_.values);
    }
    return {{inputs, targets}};
}

}  // namespace microbatch
