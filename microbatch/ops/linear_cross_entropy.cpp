#include "microbatch/ops/linear_cross_entropy.h"

#include <ATen/OpMathType.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "microbatch/autograd/fused.h"
#include "microbatch/autograd/in_place_gradients.h"
#include "microbatch/autograd/sum_in_place.h"
#include "microbatch/core/error.h"
#include "microbatch/ops/checks.h"
#include "microbatch/ops/cross_entropy.h"
#include "microbatch/ops/kernels/kernels.h"
#include "microbatch/runtime/parallel.h"

namespace microbatch {

namespace {

using torch::autograd::AutogradContext;

// The products are fastest where the rows of the logits begin at multiples of this many numbers, and where those that
// make the logits are of so many columns: 1.6 times as fast as all of 50257 columns in one.
constexpr std::int64_t even = 32, tile_columns = 1024;

std::int64_t ceiling(std::int64_t count, std::int64_t part) {
    return (count + part - 1) / part;
}

struct Wanted {
    bool grad_hidden, grad_weight;

    bool any() const { return grad_hidden || grad_weight; }
};

/// The logits of some rows at a time, always in the same memory, in the type of the sums.
class LogitChunk {
public:
    LogitChunk(const at::Tensor& hidden, const at::Tensor& weight, std::int64_t bytes)
        : weight_(weight), columns_(weight.size(0)) {
        const at::ScalarType type = weight.scalar_type(), sum_type = at::toOpMathType(type);
        const auto logit_bytes =
            static_cast<std::int64_t>(weight.element_size() + (type == sum_type ? 0 : c10::elementSize(sum_type)));
        const std::int64_t padded = ceiling(columns_, even) * even;
        // A small vocabulary would be padded to twice its width.
        stride_ = padded - columns_ <= columns_ / 16 ? padded : columns_;
        const std::int64_t most = std::max<std::int64_t>(bytes / (logit_bytes * stride_), 1);
        const std::int64_t all = std::max<std::int64_t>(hidden.size(0), 1), chunks = ceiling(all, most);
        rows_ = std::min(ceiling(ceiling(all, chunks), 8) * 8, most);  // equal chunks: a product of few rows is slow
        product_ = at::empty({rows_, stride_}, weight.options()).narrow(1, 0, columns_);
        logits_ = type == sum_type ? product_ : at::empty({rows_, columns_}, weight.options().dtype(sum_type));
    }

    std::int64_t rows() const { return rows_; }

    /// The logits of at most rows() hidden states. They may be changed.
    at::Tensor logits_of(const at::Tensor& hidden) {
        at::Tensor product = product_.narrow(0, 0, hidden.size(0));
        for (std::int64_t first = 0; first < columns_; first += tile_columns) {
            const std::int64_t count = std::min(tile_columns, columns_ - first);
            at::Tensor tile = product.narrow(1, first, count);
            at::mm_out(tile, hidden, weight_.narrow(0, first, count).t());
        }
        if (logits_.is_same(product_)) return product;
        return logits_.narrow(0, 0, hidden.size(0)).copy_(product);
    }

    /// The same in the type of the weight.
    at::Tensor rounded(const at::Tensor& logits) {
        return logits_.is_same(product_) ? logits : product_.narrow(0, 0, logits.size(0)).copy_(logits);
    }

private:
    const at::Tensor& weight_;
    std::int64_t columns_, stride_ = 0, rows_ = 0;
    at::Tensor product_;
    at::Tensor logits_;  // product_ itself, unless that is of half precision
};

/// Some targets, and which of them are ignored.
struct Targets {
    at::Tensor classes, skipped;

    Targets(const at::Tensor& all, std::int64_t ignored) : classes(all), skipped(all.eq(ignored)) {}
    Targets(at::Tensor some, at::Tensor some_skipped) : classes(std::move(some)), skipped(std::move(some_skipped)) {}

    Targets rows(std::int64_t first, std::int64_t count) const {
        return {classes.narrow(0, first, count), skipped.narrow(0, first, count)};
    }

    void require_below(std::int64_t vocabulary) const {
        if (!classes.is_cpu() || classes.numel() == 0) return;
        const at::Tensor counted = classes.masked_fill(skipped, 0);
        const auto least = counted.min().item<std::int64_t>(), most = counted.max().item<std::int64_t>();
        TORCH_CHECK_INDEX(least >= 0 && most < vocabulary, "Target ", least < 0 ? least : most,
                          " is out of bounds of a vocabulary of ", vocabulary);
    }
};

/// Computes each row's loss and, where it is needed, turns the logits into their gradient.
void differentiate(const at::Tensor& logits, const Targets& targets, bool wanted, const at::Tensor& losses) {
    const at::Tensor index = targets.classes.masked_fill(targets.skipped, 0).unsqueeze(1);
    const at::Tensor skipped = targets.skipped.unsqueeze(1);
    logits.sub_(logits.amax(1, /*keepdim=*/true));
    const at::Tensor target_logits = logits.gather(1, index);
    const at::Tensor sums = logits.exp_().sum(1, /*keepdim=*/true);
    // Not log + largest - target: that would lose digits where logits are large.
    losses.copy_(sums.log().sub_(target_logits).masked_fill_(skipped, 0).squeeze(1));
    if (!wanted) return;
    logits.mul_(sums.reciprocal().masked_fill_(skipped, 0));
    logits.scatter_add_(1, index, skipped.logical_not().to(logits.scalar_type()).neg_());
}

/// The same for float32 on the CPU, while a row is in the cache.
void differentiate_row(float* row, std::int64_t columns, std::int64_t target, bool wanted, double& loss) {
    const float target_logit = row[target];
    const auto [largest, sum] = kernels().exact->exponentiate_row(row, columns);
    loss = std::log(sum) - static_cast<double>(target_logit - largest);
    if (!wanted) return;
    kernels().exact->scale_row(row, columns, static_cast<float>(1.0 / sum));
    row[target] -= 1.0F;
}

void differentiate_rows(const at::Tensor& logits, const Targets& targets, bool wanted, const at::Tensor& losses) {
    auto* const numbers = logits.mutable_data_ptr<float>();
    const auto* const classes = targets.classes.const_data_ptr<std::int64_t>();
    const auto* const skipped = targets.skipped.const_data_ptr<bool>();
    auto* const sums = losses.mutable_data_ptr<double>();
    const std::int64_t columns = logits.size(1), stride = logits.stride(0);
    constexpr std::int64_t enough_for_a_thread = 4096;
    in_parallel(logits.size(0), 2 * enough_for_a_thread / columns, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) {
            float* const row = numbers + i * stride;
            if (skipped[i]) {
                sums[i] = 0.0;
                if (wanted) std::fill_n(row, columns, 0.0F);
            } else {
                differentiate_row(row, columns, classes[i], wanted, sums[i]);
            }
        }
    });
}

/// The products of the logits' gradients, summed over the chunks.
class Gradients {
public:
    Gradients(const at::Tensor& hidden, const at::Tensor& weight, Wanted wanted)
        : weight_(weight), half_(at::toOpMathType(weight.scalar_type()) != weight.scalar_type()) {
        const bool empty = hidden.size(0) == 0;
        if (wanted.grad_hidden) grad_hidden = at::empty_like(hidden, at::MemoryFormat::Contiguous);
        if (!wanted.grad_weight) return;
        const auto options = weight.options().dtype(at::toOpMathType(weight.scalar_type()));
        grad_weight = half_ || empty ? at::zeros(weight.sizes(), options) : at::empty(weight.sizes(), options);
    }

    void add(const at::Tensor& grad_logits, const at::Tensor& hidden, std::int64_t first_row) {
        if (grad_weight.defined()) add_to_weight(grad_logits, hidden, first_row == 0);
        if (!grad_hidden.defined()) return;
        at::Tensor rows = grad_hidden.narrow(0, first_row, grad_logits.size(0));
        at::mm_out(rows, grad_logits, weight_);
    }

    at::Tensor grad_hidden, grad_weight;

private:
    void add_to_weight(const at::Tensor& grad_logits, const at::Tensor& hidden, bool first) {
        if (half_) {
            // Half precision would leave two digits of a sum over many chunks.
            for (std::int64_t column = 0; column < grad_weight.size(0); column += tile_columns) {
                const std::int64_t count = std::min(tile_columns, grad_weight.size(0) - column);
                grad_weight.narrow(0, column, count).add_(grad_logits.narrow(1, column, count).t().mm(hidden));
            }
        } else if (first) {
            at::mm_out(grad_weight, grad_logits.t(), hidden);
        } else {
            grad_weight.addmm_(grad_logits.t(), hidden);
        }
    }

    const at::Tensor& weight_;
    bool half_;
};

class LinearCrossEntropy : public torch::autograd::Function<LinearCrossEntropy> {
public:
    static at::Tensor forward(AutogradContext* context, const at::Tensor& hidden, const at::Tensor& weight,
                              const at::Tensor& classes, std::int64_t ignored, std::int64_t chunk_bytes,
                              Wanted wanted) {
        const Targets targets(classes, ignored);
        targets.require_below(weight.size(0));
        const at::ScalarType sum_type = at::toOpMathType(weight.scalar_type());
        const bool by_rows = sum_type == at::kFloat && weight.is_cpu();
        const at::Tensor losses = at::empty({hidden.size(0)}, hidden.options().dtype(by_rows ? at::kDouble : sum_type));
        Gradients gradients(hidden, weight, wanted);
        {
            LogitChunk chunk(hidden, weight, chunk_bytes);
            for (std::int64_t first = 0; first < hidden.size(0); first += chunk.rows()) {
                const std::int64_t count = std::min(chunk.rows(), hidden.size(0) - first);
                const at::Tensor rows = hidden.narrow(0, first, count);
                const at::Tensor logits = chunk.logits_of(rows);
                (by_rows ? differentiate_rows : differentiate)(logits, targets.rows(first, count), wanted.any(),
                                                               losses.narrow(0, first, count));
                if (wanted.any()) gradients.add(chunk.rounded(logits), rows, first);
            }
        }
        if (wanted.grad_weight) gradients.grad_weight = gradients.grad_weight.to(weight.scalar_type());
        context->saved_data["grad_hidden"] = gradients.grad_hidden;
        context->saved_data["grad_weight"] = gradients.grad_weight;
        return losses.sum(at::kDouble).to(sum_type);
    }

    static variable_list backward(AutogradContext* context, variable_list gradients) {
        require_that(!at::GradMode::is_enabled(),
                     "linear_cross_entropy_sum: it does not support gradients of gradients (create_graph); "
                     "use cross_entropy_sum and at::linear instead");
        auto& saved = context->saved_data;
        require_that(!saved.empty(),
                     "linear_cross_entropy_sum: it supports one backward only, even with retain_graph; "
                     "call it again for each backward");
        // The only references, so that the receiver can keep the gradients without a copy.
        variable_list results = {saved["grad_hidden"].toTensor(), saved["grad_weight"].toTensor(), {}, {}, {}, {}};
        saved.clear();
        const at::Tensor& incoming = gradients[0];
        if (incoming.is_cpu() && incoming.item<double>() == 1.0) return results;
        for (at::Tensor& result : results) {
            if (result.defined()) result.mul_(incoming);
        }
        return results;
    }
};

/// All logits at once, of float32 on the CPU.
class AtOnce {
public:
    AtOnce(const at::Tensor& classes, std::int64_t ignored, bool wanted)
        : targets_(classes, ignored), ignored_(ignored), wanted_(wanted) {}

    FusedResult forward(const variable_list& inputs) const {
        const at::Tensor &hidden = inputs[0], &weight = inputs[1];
        targets_.require_below(weight.size(0));
        const at::Tensor losses = at::empty({hidden.size(0)}, hidden.options().dtype(at::kDouble));
        LogitChunk all(hidden, weight, std::numeric_limits<std::int64_t>::max());
        const at::Tensor logits = all.logits_of(hidden);
        differentiate_rows(logits, targets_, wanted_, losses);
        return {losses.sum().to(at::kFloat), {wanted_ ? logits : at::Tensor()}};
    }

    variable_list backward(const FusedBackward& of) const {
        const at::Tensor &hidden = of.inputs[0], &weight = of.inputs[1], &grad_logits = of.saved[0];
        const auto incoming = of.gradient.item<double>();
        variable_list results(2);
        if (of.needed[1] && !(in_place_ && add_to_leaf(weight, grad_logits, hidden, incoming))) {
            results[1] = scaled(grad_logits.t().mm(hidden), incoming);
        }
        if (of.needed[0]) results[0] = scaled(grad_logits.mm(weight), incoming);
        return results;
    }

    at::Tensor by_operators(const variable_list& inputs) const {
        return cross_entropy_sum(inputs[0].mm(inputs[1].t()), targets_.classes, ignored_);
    }

private:
    static at::Tensor scaled(at::Tensor product, double factor) {
        return factor == 1.0 ? product : product.mul_(factor);
    }

    static bool add_to_leaf(const at::Tensor& leaf, const at::Tensor& grad_logits, const at::Tensor& hidden,
                            double factor) {
        return sum_in_place(leaf, {grad_logits, hidden},
                            [&](at::Tensor& sum) { sum.addmm_(grad_logits.t(), hidden, 1, factor); });
    }

    Targets targets_;
    std::int64_t ignored_;
    bool wanted_, in_place_ = InPlaceGradients::active();
};

void require_weight(const at::Tensor& weight, const at::Tensor& hidden) {
    require_that(weight.defined(), "the weight is an undefined tensor");
    require_that(weight.dim() == 2 && weight.size(1) == hidden.size(-1), "a weight of shape ", weight.sizes(),
                 " does not match hidden states of shape ", hidden.sizes(),
                 "; give [vocabulary, width] and [..., width]");
    require_that(weight.scalar_type() == hidden.scalar_type(), "the weight is ", weight.scalar_type(),
                 ", the hidden states are ", hidden.scalar_type(), "; convert one with .to()");
    require_that(weight.size(0) != 0, "a weight of shape ", weight.sizes(), " has no classes");
}

}  // namespace

at::Tensor linear_cross_entropy_sum(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
                                    std::int64_t ignored, std::int64_t chunk_bytes) {
    require_targets(targets);
    require_rows("hidden states", "width", hidden, targets);
    require_weight(weight, hidden);
    require_that(chunk_bytes >= 1, "chunk_bytes is ", chunk_bytes, "; give at least 1");
    const bool recorded = at::GradMode::is_enabled();
    const Wanted wanted{recorded && hidden.requires_grad(), recorded && weight.requires_grad()};
    return LinearCrossEntropy::apply(hidden.reshape({targets.numel(), hidden.size(-1)}), weight,
                                     targets.reshape({-1}).contiguous(), ignored, chunk_bytes, wanted);
}

at::Tensor linear_cross_entropy_sum_at_once(const at::Tensor& hidden, const at::Tensor& weight,
                                            const at::Tensor& targets, std::int64_t ignored) {
    require_targets(targets);
    require_rows("hidden states", "width", hidden, targets);
    require_weight(weight, hidden);
    const at::Tensor rows = hidden.reshape({targets.numel(), hidden.size(-1)}),
                     classes = targets.reshape({-1}).contiguous();
    if (!is_fp32_on_cpu(hidden) || !is_fp32_on_cpu(weight) || operators_are_watched() || rows.size(0) == 0) {
        return cross_entropy_sum(at::mm(rows, weight.t()), classes, ignored);
    }
    const bool wanted = at::GradMode::is_enabled() && (hidden.requires_grad() || weight.requires_grad());
    return Fused<AtOnce>::of({classes, ignored, wanted}, {rows, weight});
}

}  // namespace microbatch
