#include "microbatch/nn/linear_cross_entropy.h"

#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "microbatch/core/error.h"
#include "microbatch/core/text.h"
#include "microbatch/nn/require.h"

namespace microbatch {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// A range of rows or columns.
struct Range {
    std::int64_t first;
    std::int64_t count;

    at::Tensor of(const at::Tensor& all) const { return all.narrow(0, first, count); }
};

struct TileSize {
    std::int64_t rows;
    std::int64_t columns;
};

/// Square where there is room: a product then reads and writes least for its arithmetic. Strips of few rows would go
/// through all of the weight's gradient for each.
TileSize tile_size(std::int64_t rows, std::int64_t columns, std::int64_t logits) {
    constexpr std::int64_t even = 16;
    auto side = static_cast<std::int64_t>(std::sqrt(static_cast<double>(logits)));
    if (side > even) side -= side % even;
    const std::int64_t height = std::clamp<std::int64_t>(rows, 1, side);
    const std::int64_t width = std::min(columns, logits / height);
    return {std::clamp<std::int64_t>(rows, 1, logits / width), width};
}

/// All logits, a tile of them at a time, always in the same memory, in the type of the sums.
class LogitTiles {
public:
    LogitTiles(const at::Tensor& hidden, const at::Tensor& weight, std::int64_t bytes)
        : hidden_(hidden), weight_(weight), sum_type_(at::toOpMathType(weight.scalar_type())) {
        const bool half = sum_type_ != weight.scalar_type();
        const auto logit_bytes = static_cast<std::int64_t>(weight.element_size() + (half ? sizeof(float) : 0));
        size_ = tile_size(hidden.size(0), weight.size(0), std::max<std::int64_t>(bytes / logit_bytes, 1));
        product_ = at::empty({size_.rows * size_.columns}, weight.options());
        if (half) logits_ = at::empty_like(product_, sum_type_);
    }

    at::ScalarType sum_type() const { return sum_type_; }

    /// Calls with the rows, the columns and their logits, which it may change.
    template <class Call>
    void for_each(Call&& call) {
        for (std::int64_t c = 0; c < weight_.size(0); c += size_.columns) {
            const Range columns{c, std::min(size_.columns, weight_.size(0) - c)};
            for (std::int64_t r = 0; r < hidden_.size(0); r += size_.rows) {
                const Range rows{r, std::min(size_.rows, hidden_.size(0) - r)};
                at::Tensor product = tile(product_, rows, columns);
                at::mm_out(product, rows.of(hidden_), columns.of(weight_).t());
                call(rows, columns, logits_.defined() ? tile(logits_, rows, columns).copy_(product) : product);
            }
        }
    }

    /// The tile in the type of the weight.
    at::Tensor rounded(const at::Tensor& logits) {
        return logits_.defined() ? product_.narrow(0, 0, logits.numel()).view_as(logits).copy_(logits) : logits;
    }

private:
    static at::Tensor tile(const at::Tensor& memory, const Range& rows, const Range& columns) {
        return memory.narrow(0, 0, rows.count * columns.count).view({rows.count, columns.count});
    }

    const at::Tensor& hidden_;
    const at::Tensor& weight_;
    at::ScalarType sum_type_;
    TileSize size_{};
    at::Tensor product_;
    at::Tensor logits_;  // of half precision
};

/// The targets as a column of their own.
class Targets {
public:
    Targets(const at::Tensor& targets, std::int64_t ignored)
        : targets_(targets.unsqueeze(1)), skipped_(targets_.eq(ignored)) {}

    const at::Tensor& skipped() const { return skipped_; }

    void require_below(std::int64_t vocabulary) const {
        if (!targets_.is_cpu() || targets_.numel() == 0) return;
        const at::Tensor counted = targets_.masked_fill(skipped_, 0);
        const auto least = counted.min().item<std::int64_t>(), most = counted.max().item<std::int64_t>();
        TORCH_CHECK_INDEX(least >= 0 && most < vocabulary, "Target ", least < 0 ? least : most,
                          " is out of bounds of a vocabulary of ", vocabulary);
    }

    /// Where in a tile the targets are: an index of every row, and whether it is one.
    std::pair<at::Tensor, at::Tensor> in(const Range& rows, const Range& columns) const {
        const at::Tensor from_first = rows.of(targets_).sub(columns.first);
        const at::Tensor index = from_first.clamp(0, columns.count - 1);
        return {index, index.eq(from_first)};
    }

private:
    at::Tensor targets_;
    at::Tensor skipped_;
};

/// Half precision would keep two digits of a sum of many tiles.
void add_product(at::Tensor sum, const at::Tensor& left, const at::Tensor& right) {
    if (sum.scalar_type() == left.scalar_type()) {
        sum.addmm_(left, right);
    } else {
        sum.add_(left.mm(right));
    }
}

class LinearCrossEntropy : public torch::autograd::Function<LinearCrossEntropy> {
public:
    static at::Tensor forward(AutogradContext* context, const at::Tensor& hidden, const at::Tensor& weight,
                              const at::Tensor& classes, std::int64_t ignored, std::int64_t chunk_bytes) {
        const Targets targets(classes, ignored);
        targets.require_below(weight.size(0));
        LogitTiles tiles(hidden, weight, chunk_bytes);
        const at::TensorOptions numbers = hidden.options().dtype(tiles.sum_type());
        // Not minus infinity, from which minus infinity could not be subtracted.
        const double least = -std::numeric_limits<float>::max();
        const at::Tensor largest = at::full({hidden.size(0), 1}, least, numbers);
        const at::Tensor sums = at::zeros_like(largest), picked = at::zeros_like(largest);
        tiles.for_each([&](const Range& rows, const Range& columns, at::Tensor logits) {
            at::Tensor top = rows.of(largest), sum = rows.of(sums), of_targets = rows.of(picked);
            const auto [index, here] = targets.in(rows, columns);
            of_targets.copy_(logits.gather(1, index).where(here, of_targets));
            const at::Tensor higher = at::maximum(top, logits.amax(1, /*keepdim=*/true));
            sum.mul_(top.sub_(higher).exp_()).add_(logits.sub_(higher).exp_().sum(1, /*keepdim=*/true));
            top.copy_(higher);
        });
        context->save_for_backward({hidden, weight, classes, largest, sums});
        context->saved_data["ignored"] = ignored;
        context->saved_data["chunk_bytes"] = chunk_bytes;
        // Not the logarithm plus the largest, less the target's: that would lose digits where logits are large.
        const at::Tensor losses = sums.log().sub_(picked.sub_(largest)).masked_fill_(targets.skipped(), 0);
        return losses.sum(at::kDouble).to(tiles.sum_type());
    }

    static variable_list backward(AutogradContext* context, variable_list gradients) {
        if (at::GradMode::is_enabled()) {
            throw Error(ErrorKind::usage,
                        "linear_cross_entropy_sum: it has no gradient of a gradient (create_graph); "
                        "use cross_entropy_sum of at::linear for it");
        }
        const variable_list saved = context->get_saved_variables();
        const at::Tensor &hidden = saved[0], &weight = saved[1], &largest = saved[3], &sums = saved[4];
        const Targets targets(saved[2], context->saved_data["ignored"].toInt());
        const at::Tensor scales = gradients[0].div(sums).masked_fill_(targets.skipped(), 0);
        const at::Tensor shifts = gradients[0].neg().expand_as(sums).masked_fill(targets.skipped(), 0);
        LogitTiles tiles(hidden, weight, context->saved_data["chunk_bytes"].toInt());
        at::Tensor of_hidden, of_weight;
        if (context->needs_input_grad(0)) of_hidden = at::zeros_like(hidden, tiles.sum_type());
        if (context->needs_input_grad(1)) of_weight = at::zeros_like(weight, tiles.sum_type());
        tiles.for_each([&](const Range& rows, const Range& columns, at::Tensor logits) {
            logits.sub_(rows.of(largest)).exp_().mul_(rows.of(scales));
            const auto [index, here] = targets.in(rows, columns);
            logits.scatter_add_(1, index, rows.of(shifts).mul(here));
            const at::Tensor of_logits = tiles.rounded(logits);
            if (of_weight.defined()) add_product(columns.of(of_weight), of_logits.t(), rows.of(hidden));
            if (of_hidden.defined()) add_product(rows.of(of_hidden), of_logits, columns.of(weight));
        });
        if (of_hidden.defined()) of_hidden = of_hidden.to(hidden.scalar_type());
        if (of_weight.defined()) of_weight = of_weight.to(weight.scalar_type());
        return {of_hidden, of_weight, at::Tensor(), at::Tensor(), at::Tensor()};
    }
};

void require_weight(const at::Tensor& weight, const at::Tensor& hidden) {
    if (!weight.defined()) throw Error(ErrorKind::usage, "the weight is an undefined tensor");
    if (weight.dim() != 2 || weight.size(1) != hidden.size(-1)) {
        throw Error(ErrorKind::usage, text("a weight of shape ", weight.sizes(), " does not go with hidden states of ",
                                           "shape ", hidden.sizes(), "; give [vocabulary, width] and [..., width]"));
    }
    if (weight.scalar_type() != hidden.scalar_type()) {
        throw Error(ErrorKind::usage, text("the weight is ", weight.scalar_type(), ", the hidden states are ",
                                           hidden.scalar_type(), "; convert one by .to()"));
    }
    if (weight.size(0) == 0) throw Error(ErrorKind::usage, text("a weight of shape ", weight.sizes(), " has no class"));
}

}  // namespace

at::Tensor linear_cross_entropy_sum(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
                                    std::int64_t ignored, std::int64_t chunk_bytes) {
    require_targets(targets);
    require_rows("hidden states", "width", hidden, targets);
    require_weight(weight, hidden);
    if (chunk_bytes < 1) throw Error(ErrorKind::usage, text("chunk_bytes is ", chunk_bytes, "; give at least 1"));
    return LinearCrossEntropy::apply(hidden.reshape({targets.numel(), hidden.size(-1)}), weight, targets.reshape({-1}),
                                     ignored, chunk_bytes);
}

}  // namespace microbatch
