#include "microbatch/ops/fused/residual.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/add.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>
#include <functional>

#include "microbatch/memory/budget_allocator.h"
#include "microbatch/memory/memory_trace.h"
#include "microbatch/ops/fused/group_norm_rows.h"
#include "microbatch/runtime/parallel.h"

namespace microbatch {

namespace {

constexpr auto channels_last = at::MemoryFormat::ChannelsLast;

// One for each thread: oneDNN spends some 60 microseconds on every call, so smaller parts, though they would stay in
// the cache, lose more than they win.
std::int64_t count_parts(std::int64_t samples) {
    return std::min<std::int64_t>(samples, at::get_num_threads());
}

/// The samples of part `number` of `count`.
struct Part {
    std::int64_t begin, size;

    Part(std::int64_t samples, std::int64_t number, std::int64_t count)
        : begin(samples * number / count), size(samples * (number + 1) / count - begin) {}
    at::Tensor of(const at::Tensor& images) const { return images.narrow(0, begin, size); }
};

/// Calls work(number) for every part, each in one of torch's threads, which runs torch's operators alone.
void for_each_part(std::int64_t count, const std::function<void(std::int64_t)>& work) {
    in_parallel(count, 1, [&](std::int64_t begin, std::int64_t end) {
        const OneThread one_thread;
        const UntracedMemory untraced;  // it is already accounted for
        const at::NoGradGuard no_grad;
        const at::AutoDispatchBelowADInplaceOrView no_autograd;
        for (std::int64_t number = begin; number < end; ++number) work(number);
    });
}

/// A convolution and the norm after it.
struct Layer {
    at::Tensor weight;
    std::int64_t stride;
    GroupNormLayer norm;

    at::Tensor convolve(const at::Tensor& x) const { return convolution(x, weight, stride).contiguous(channels_last); }

    struct Gradients {
        at::Tensor grad_x, grad_weight;
    };

    /// Undefined where not needed.
    Gradients backward(const at::Tensor& gradient, const at::Tensor& x, bool wants_x, bool wants_weight) const {
        if (!wants_x && !wants_weight) return {};
        const std::int64_t padding = weight.size(2) / 2;
        auto [grad_x, grad_weight, grad_bias] =
            at::convolution_backward(gradient, x, weight, at::nullopt, {stride, stride}, {padding, padding}, {1, 1},
                                     false, {0, 0}, 1, {wants_x, wants_weight, false});
        return {grad_x, grad_weight};
    }
};

struct Layers {
    Layer first, second, projection;

    Layers(const ResidualWeights& w, const ResidualOptions& options)
        : first{laid_out(w.first), options.stride, {w.first_scale, w.first_shift, options.groups, options.epsilon}},
          second{laid_out(w.second), 1, {w.second_scale, w.second_shift, options.groups, options.epsilon}},
          projection{laid_out(w.projection),
                     options.stride,
                     {w.projection_scale, w.projection_shift, options.groups, options.epsilon}} {}

    bool projects() const { return projection.weight.defined(); }
    std::int64_t channels() const { return first.norm.channels(); }

private:
    // In the convolutions' layout: converted once, not for every part.
    static at::Tensor laid_out(const at::Tensor& weight) {
        return weight.defined() ? weight.contiguous(channels_last) : weight;
    }
};

/// relu(norm(x)).
at::Tensor activated(const GroupNormLayer& norm, const at::Tensor& x, const at::Tensor& statistics, float* scratch,
                     bool again) {
    at::Tensor y = at::empty_like(x);
    group_norm_forward(norm, x, {.relu = true}, y, statistics, scratch, again);
    return y;
}

/// `out` is the part's slice of the result.
ResidualSaved forward_of_part(const Layers& layers, const at::Tensor& x, const at::Tensor& out, float* scratch) {
    ResidualSaved saved;
    saved.statistics = at::empty({3, x.size(0), 2, layers.first.norm.groups}, x.options());
    at::Tensor shortcut = x;
    if (layers.projects()) {
        saved.projected = layers.projection.convolve(x);
        shortcut = at::empty_like(saved.projected);
        group_norm_forward(layers.projection.norm, saved.projected, {}, shortcut, saved.statistics[2], scratch);
    }
    saved.first = layers.first.convolve(x);
    saved.second = layers.second.convolve(
        activated(layers.first.norm, saved.first, saved.statistics[0], scratch, /*again=*/false));
    group_norm_forward(layers.second.norm, saved.second, {.added = shortcut, .relu = true}, out, saved.statistics[1],
                       scratch);
    return saved;
}

/// Sums of the gradients of a layer's weights over the parts of one thread.
struct LayerSums {
    at::Tensor weight;  ///< undefined before the first part
    at::Tensor norm;    ///< [2, channels]

    /// Returns the gradient of x.
    at::Tensor add(const Layer::Gradients& gradients) {
        add(weight, gradients.grad_weight);
        return gradients.grad_x;
    }

    /// Adds another thread's sums, which may be empty.
    void add(const LayerSums& other) {
        add(weight, other.weight);
        add(norm, other.norm);
    }

private:
    static void add(at::Tensor& sum, const at::Tensor& one) {
        if (!one.defined()) return;
        sum = sum.defined() ? sum.add_(one) : one;
    }
};
using Sums = std::array<LayerSums, 3>;

/// grad_x is the part's slice of the gradient of x, or undefined.
void backward_of_part(const Layers& layers, const at::Tensor& x, const at::Tensor& out, const ResidualSaved& saved,
                      const at::Tensor& gradient, const ResidualWanted& wanted, at::Tensor grad_x, Sums& sums,
                      float* scratch) {
    at::Tensor grad_shortcut = layers.projects() ? at::empty_like(out) : grad_x;
    const auto through_norm = [&](std::size_t layer, const GroupNormLayer& norm, const at::Tensor& made,
                                  const at::Tensor& y, const at::Tensor& grad_y, const at::Tensor& grad_added) {
        at::Tensor grad_made = at::empty_like(made);
        group_norm_backward(norm, made, y, saved.statistics[static_cast<std::int64_t>(layer)], grad_y,
                            {grad_made, grad_added, sums[layer].norm.mutable_data_ptr<float>()}, scratch);
        return grad_made;
    };
    at::Tensor grad_second = through_norm(1, layers.second.norm, saved.second, out, gradient, grad_shortcut);
    at::Tensor inner = activated(layers.first.norm, saved.first, saved.statistics[0], scratch, /*again=*/true);
    at::Tensor grad_inner = sums[1].add(layers.second.backward(grad_second, inner, /*wants_x=*/true, wanted.second));
    grad_second.reset();
    at::Tensor grad_first =
        through_norm(0, layers.first.norm, saved.first, inner, grad_inner.contiguous(channels_last), {});
    inner.reset();
    grad_inner.reset();
    const at::Tensor through_first = sums[0].add(layers.first.backward(grad_first, x, wanted.x, wanted.first));
    grad_first.reset();
    if (!layers.projects()) {
        if (wanted.x) grad_x.add_(through_first);
        return;
    }
    const at::Tensor grad_projected = through_norm(2, layers.projection.norm, saved.projected, {}, grad_shortcut, {});
    grad_shortcut.reset();
    const at::Tensor through_projection =
        sums[2].add(layers.projection.backward(grad_projected, x, wanted.x, wanted.projection));
    if (wanted.x) at::add_out(grad_x, through_first, through_projection);
}

/// Upper bound of what all parts hold at once, whatever the threads' timing: numbers per sample, and per thread even
/// with fewer samples, so that it grows evenly with them.
std::int64_t most_held(const at::Tensor& x, std::int64_t per_sample, std::int64_t per_thread) {
    return static_cast<std::int64_t>(sizeof(float)) * (x.size(0) * per_sample + at::get_num_threads() * per_thread);
}

// Besides its results, a convolution in oneDNN 3.12 holds a copy of its weight with the channels rounded up to vectors,
// another in backward, and some numbers: measured for 1 to 32 samples.
constexpr std::int64_t some_numbers = 16 << 10;

std::int64_t rounded_weight(const at::Tensor& weight) {
    const auto rounded = [](std::int64_t channels) { return (channels + 15) / 16 * 16; };
    return weight.defined() ? rounded(weight.size(0)) * rounded(weight.size(1)) * weight.size(2) * weight.size(3) : 0;
}

void expect_forward(const Layers& layers, const at::Tensor& x, const at::Tensor& out) {
    const std::int64_t image = out[0].numel();
    const std::int64_t images = layers.projects() ? 5 : 3;  // three or two saved, the inner one, the shortcut's
    const std::int64_t statistics = 6 * layers.first.norm.groups;
    expect_memory(
        most_held(x, images * image + statistics,
                  std::max(rounded_weight(layers.first.weight), rounded_weight(layers.second.weight)) + some_numbers));
}

void expect_backward(const Layers& layers, const at::Tensor& x, const at::Tensor& out) {
    const std::int64_t image = out[0].numel(), input = x[0].numel();
    const std::int64_t per_sample =
        layers.projects() ? std::max({4 * image, 2 * image + input, image + 2 * input}) : 3 * image;
    const std::int64_t first = rounded_weight(layers.first.weight), second = rounded_weight(layers.second.weight);
    // Sums of gradients, the next gradients to add, and what oneDNN holds.
    const std::int64_t per_thread =
        first + second + rounded_weight(layers.projection.weight) + 3 * std::max(first, second) + some_numbers;
    expect_memory(most_held(x, per_sample, per_thread));
}

}  // namespace

at::Tensor convolution(const at::Tensor& x, const at::Tensor& weight, std::int64_t stride) {
    const std::int64_t padding = weight.size(-1) / 2;
    return at::convolution(x, weight, {}, {stride, stride}, {padding, padding}, {1, 1}, /*transposed=*/false, {0, 0},
                           /*groups=*/1);
}

std::pair<at::Tensor, std::vector<ResidualSaved>> residual_forward(const at::Tensor& x, const ResidualWeights& weights,
                                                                   const ResidualOptions& options) {
    const Layers layers(weights, options);
    const std::int64_t stride = options.stride;
    at::Tensor out =
        at::empty({x.size(0), layers.channels(), (x.size(2) + stride - 1) / stride, (x.size(3) + stride - 1) / stride},
                  x.options().memory_format(channels_last));
    const at::Tensor scratch = group_norm_scratch(layers.first.norm);
    const std::int64_t parts = count_parts(x.size(0));
    expect_forward(layers, x, out);
    std::vector<ResidualSaved> saved(static_cast<std::size_t>(parts));
    for_each_part(parts, [&](std::int64_t number) {
        const Part part(x.size(0), number, parts);
        saved[static_cast<std::size_t>(number)] =
            forward_of_part(layers, part.of(x), part.of(out), thread_row(scratch));
    });
    return {out, saved};
}

std::vector<at::Tensor> residual_backward(const at::Tensor& x, const ResidualWeights& weights,
                                          const ResidualOptions& options, const at::Tensor& out,
                                          const std::vector<ResidualSaved>& saved, const at::Tensor& gradient,
                                          const ResidualWanted& wanted) {
    const Layers layers(weights, options);
    const at::Tensor grad_x = wanted.x ? at::empty_like(x) : at::Tensor();
    const std::int64_t channels = layers.channels();
    const at::Tensor scratch = group_norm_scratch(layers.first.norm);
    std::vector<Sums> sums(static_cast<std::size_t>(thread_places()));
    for (Sums& own : sums) {
        for (LayerSums& layer : own) layer.norm = at::zeros({2, channels}, x.options());
    }
    const auto parts = static_cast<std::int64_t>(saved.size());
    expect_backward(layers, x, out);
    for_each_part(parts, [&](std::int64_t number) {
        const Part part(x.size(0), number, parts);
        backward_of_part(layers, part.of(x), part.of(out), saved[static_cast<std::size_t>(number)], part.of(gradient),
                         wanted, wanted.x ? part.of(grad_x) : grad_x,
                         sums[static_cast<std::size_t>(at::get_thread_num())], thread_row(scratch));
    });
    std::vector<at::Tensor> results{grad_x};
    for (std::size_t layer = 0; layer < (layers.projects() ? 3U : 2U); ++layer) {
        LayerSums total;
        for (const Sums& own : sums) total.add(own[layer]);
        results.insert(results.end(), {total.weight, total.norm[0], total.norm[1]});
    }
    return results;
}

}  // namespace microbatch
