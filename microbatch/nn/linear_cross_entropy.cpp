#include "microbatch/nn/linear_cross_entropy.h"

#include <ATen/OpMathType.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/gather.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

#include "microbatch/core/error.h"
#include "microbatch/core/text.h"
#include "microbatch/nn/require.h"

namespace microbatch {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// Bytes of one logit: half precision has a copy in float32.
std::int64_t logit_bytes(at::ScalarType type) {
    const at::ScalarType sums = at::toOpMathType(type);
    return static_cast<std::int64_t>(at::elementSize(type) + (sums == type ? 0 : at::elementSize(sums)));
}

std::int64_t rows_of_a_chunk(const at::Tensor& weight, std::int64_t chunk_bytes) {
    constexpr std::int64_t even = 16;  // a product of whole vectors of rows is faster
    const std::int64_t rows = chunk_bytes / logit_bytes(weight.scalar_type()) / weight.size(0);
    return rows >= even ? rows / even * even : std::max<std::int64_t>(rows, 1);
}

/// The logits of a few rows at a time, always in the same memory.
class LogitChunk {
public:
    LogitChunk(const at::Tensor& hidden, const at::Tensor& weight, std::int64_t rows)
        : weight_(weight),
          product_(at::empty({std::min(rows, hidden.size(0)), weight.size(0)}, weight.options())),
          logits_(product_.scalar_type() == sum_type() ? product_ : at::empty_like(product_, sum_type())) {}

    at::ScalarType sum_type() const { return at::toOpMathType(weight_.scalar_type()); }

    /// In the type of the sums; to be changed as one likes.
    at::Tensor of(const at::Tensor& hidden) {
        at::Tensor product = product_.narrow(0, 0, hidden.size(0));
        at::mm_out(product, hidden, weight_.t());
        return logits_.is_same(product_) ? product : logits_.narrow(0, 0, hidden.size(0)).copy_(product);
    }

    /// What `of` gave, in the type of the weight.
    at::Tensor rounded(const at::Tensor& logits) {
        return logits_.is_same(product_) ? logits : product_.narrow(0, 0, logits.size(0)).copy_(logits);
    }

private:
    const at::Tensor& weight_;
    at::Tensor product_;
    at::Tensor logits_;
};

template <class Call>
void for_each_chunk(std::int64_t rows, std::int64_t chunk_rows, Call&& call) {
    for (std::int64_t first = 0; first < rows; first += chunk_rows) call(first, std::min(chunk_rows, rows - first));
}

/// The targets as a column, and which of them do not count; those are 0, so that they are an index like the others.
struct Column {
    Column(const at::Tensor& targets, std::int64_t ignored)
        : skipped(targets.eq(ignored).unsqueeze(1)), targets_(targets.unsqueeze(1).masked_fill(skipped, 0)) {}

    at::Tensor narrow(std::int64_t first, std::int64_t count) const { return targets_.narrow(0, first, count); }
    void require_below(std::int64_t vocabulary) const {
        if (!targets_.is_cpu() || targets_.numel() == 0) return;
        const auto least = targets_.min().item<std::int64_t>(), most = targets_.max().item<std::int64_t>();
        TORCH_CHECK_INDEX(least >= 0 && most < vocabulary, "Target ", least < 0 ? least : most,
                          " is out of bounds of a vocabulary of ", vocabulary);
    }

    at::Tensor skipped;

private:
    at::Tensor targets_;
};

class LinearCrossEntropy : public torch::autograd::Function<LinearCrossEntropy> {
public:
    static at::Tensor forward(AutogradContext* context, const at::Tensor& hidden, const at::Tensor& weight,
                              const at::Tensor& targets, std::int64_t ignored, std::int64_t chunk_rows) {
        const Column column(targets, ignored);
        column.require_below(weight.size(0));
        LogitChunk chunk(hidden, weight, chunk_rows);
        at::Tensor largest = at::empty({hidden.size(0), 1}, hidden.options().dtype(chunk.sum_type()));
        at::Tensor sums = at::empty_like(largest), picked = at::empty_like(largest);
        for_each_chunk(hidden.size(0), chunk_rows, [&](std::int64_t first, std::int64_t count) {
            const auto part = [&](const at::Tensor& all) { return all.narrow(0, first, count); };
            at::Tensor logits = chunk.of(part(hidden));
            at::Tensor top = part(largest), sum = part(sums), of_targets = part(picked);
            at::amax_out(top, logits, 1, /*keepdim=*/true);
            at::gather_out(of_targets, logits, 1, column.narrow(first, count));
            at::sum_out(sum, logits.sub_(top).exp_(), 1, /*keepdim=*/true);
        });
        context->save_for_backward({hidden, weight, targets, largest, sums});
        context->saved_data["ignored"] = ignored;
        context->saved_data["chunk_rows"] = chunk_rows;
        // Not the logarithm plus the largest, less the target's: that would lose digits where logits are large.
        const at::Tensor losses = sums.log().sub_(picked.sub_(largest)).masked_fill_(column.skipped, 0);
        return losses.sum(at::kDouble).to(chunk.sum_type());
    }

    static variable_list backward(AutogradContext* context, variable_list gradients) {
        if (at::GradMode::is_enabled()) {
            throw Error(ErrorKind::usage,
                        "linear_cross_entropy_sum: it has no gradient of a gradient (create_graph); "
                        "use cross_entropy_sum of at::linear for it");
        }
        const variable_list saved = context->get_saved_variables();
        const Column column(saved[2], context->saved_data["ignored"].toInt());
        return differentiate(saved, column, gradients[0], context->saved_data["chunk_rows"].toInt(),
                             context->needs_input_grad(0), context->needs_input_grad(1));
    }

private:
    static variable_list differentiate(const variable_list& saved, const Column& column, const at::Tensor& gradient,
                                       std::int64_t chunk_rows, bool of_hidden, bool of_weight) {
        const at::Tensor &hidden = saved[0], &weight = saved[1], &largest = saved[3], &sums = saved[4];
        const at::Tensor scales = gradient.div(sums).masked_fill_(column.skipped, 0);
        const at::Tensor shifts = gradient.neg().expand_as(sums).masked_fill(column.skipped, 0);
        LogitChunk chunk(hidden, weight, chunk_rows);
        at::Tensor hidden_gradient, weight_gradient;
        if (of_hidden) hidden_gradient = at::empty_like(hidden, at::MemoryFormat::Contiguous);
        // Half precision would keep two digits of a sum of many chunks.
        if (of_weight) weight_gradient = at::zeros(weight.sizes(), weight.options().dtype(chunk.sum_type()));
        for_each_chunk(hidden.size(0), chunk_rows, [&](std::int64_t first, std::int64_t count) {
            const auto part = [&](const at::Tensor& all) { return all.narrow(0, first, count); };
            at::Tensor logits = chunk.of(part(hidden));
            logits.sub_(part(largest)).exp_().mul_(part(scales));
            logits.scatter_add_(1, column.narrow(first, count), part(shifts));
            if (of_weight) weight_gradient.addmm_(logits.t(), part(hidden).to(logits.scalar_type()));
            if (!of_hidden) return;
            at::Tensor rows = part(hidden_gradient);
            at::mm_out(rows, chunk.rounded(logits), weight);
        });
        if (of_weight) weight_gradient = weight_gradient.to(weight.scalar_type());
        return {hidden_gradient, weight_gradient, at::Tensor(), at::Tensor(), at::Tensor()};
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
                                     ignored, rows_of_a_chunk(weight, chunk_bytes));
}

}  // namespace microbatch
