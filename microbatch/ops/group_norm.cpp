#include "microbatch/ops/group_norm.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/group_norm.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "microbatch/autograd/fused.h"
#include "microbatch/autograd/sum_in_place.h"
#include "microbatch/ops/fused/group_norm_rows.h"
#include "microbatch/runtime/parallel.h"

namespace microbatch {

namespace {

constexpr auto channels_last = at::MemoryFormat::ChannelsLast;
constexpr std::int64_t grain = 16384;  // below this many numbers threads do not pay

/// Samples that one thread processes.
struct Range {
    std::int64_t begin, end;

    at::Tensor of(const at::Tensor& tensor) const {
        return tensor.defined() ? tensor.narrow(0, begin, end - begin) : tensor;
    }
};

/// Calls call(range) for ranges of samples, each in one of torch's threads.
template <class Call>
void for_samples(const at::Tensor& x, const Call& call) {
    in_parallel(x.size(0), std::max<std::int64_t>(grain / x[0].numel(), 1), [&](std::int64_t begin, std::int64_t end) {
        const at::NoGradGuard no_grad;
        call(Range{begin, end});
    });
}

/// Of x, scale, shift and, where there is one, what is added.
struct FusedGroupNorm {
    std::int64_t groups;
    double epsilon;
    bool relu;

    GroupNormLayer layer_of(const variable_list& inputs) const { return {inputs[1], inputs[2], groups, epsilon}; }
    NormTail tail_of(const variable_list& inputs) const {
        return {.added = inputs.size() > 3 ? inputs[3] : at::Tensor(), .relu = relu};
    }

    FusedResult forward(const variable_list& inputs) const {
        const at::Tensor& x = inputs[0];
        const GroupNormLayer layer = layer_of(inputs);
        const NormTail tail = tail_of(inputs);
        at::Tensor y = at::empty_like(x);
        const at::Tensor statistics = at::empty({x.size(0), 2, groups}, x.options());
        const at::Tensor scratch = group_norm_scratch(layer);
        for_samples(x, [&](const Range& range) {
            group_norm_forward(layer, range.of(x), {.added = range.of(tail.added), .relu = relu}, range.of(y),
                               range.of(statistics), thread_row(scratch));
        });
        return {y, {statistics, relu ? y : at::Tensor()}};
    }

    variable_list backward(const FusedBackward& of) const {
        const at::Tensor &x = of.inputs[0], &statistics = of.saved[0], &y = of.saved[1];
        const at::Tensor gradient = of.gradient.contiguous(channels_last);
        const GroupNormLayer layer = layer_of(of.inputs);
        const at::Tensor grad_x = at::empty_like(x);
        // Without ReLU the gradient of what was added is that of y.
        const bool adds = of.needed.size() > 3 && of.needed[3];
        const at::Tensor grad_added = adds && relu ? at::empty_like(x) : at::Tensor();
        const at::Tensor scratch = group_norm_scratch(layer);
        const std::int64_t channels = layer.channels();
        const at::Tensor sums = at::zeros({thread_places(), 2 * channels}, x.options());
        for_samples(x, [&](const Range& range) {
            group_norm_backward(layer, range.of(x), range.of(y), range.of(statistics), range.of(gradient),
                                {range.of(grad_x), range.of(grad_added), thread_row(sums)}, thread_row(scratch));
        });
        variable_list results{grad_x, sums.narrow(1, 0, channels).sum(0), sums.narrow(1, channels, channels).sum(0)};
        if (adds) results.push_back(grad_added.defined() ? grad_added : gradient);
        return results;
    }

    at::Tensor by_operators(const variable_list& inputs) const {
        return group_norm_by_operators(inputs[0], groups, inputs[1], inputs[2], epsilon, tail_of(inputs));
    }
};

/// True if the fused version supports these shapes and types; otherwise torch's operators report what is wrong.
bool is_fast(const at::Tensor& x, std::int64_t groups, const at::Tensor& scale, const at::Tensor& shift,
             const at::Tensor& added) {
    const auto is_of_channels = [&](const at::Tensor& one) {
        return is_fp32_on_cpu(one) && one.is_contiguous() && one.sizes() == at::IntArrayRef{x.size(1)};
    };
    return is_fp32_on_cpu(x) && x.dim() == 4 && x.numel() > 0 && x.is_contiguous(channels_last) && groups >= 1 &&
           x.size(1) % groups == 0 && is_of_channels(scale) && is_of_channels(shift) &&
           (!added.defined() || (is_fp32_on_cpu(added) && added.sizes() == x.sizes())) && !operators_are_watched() &&
           !at::autocast::is_autocast_enabled(at::kCPU);
}

}  // namespace

at::Tensor group_norm_by_operators(const at::Tensor& x, std::int64_t groups, const at::Tensor& scale,
                                   const at::Tensor& shift, double epsilon, const NormTail& tail) {
    at::Tensor y = at::group_norm(x, groups, scale, shift, epsilon);
    if (tail.added.defined()) y = y + tail.added;
    return tail.relu ? at::relu(y) : y;
}

at::Tensor group_norm(const at::Tensor& x, std::int64_t groups, const at::Tensor& scale, const at::Tensor& shift,
                      double epsilon, const NormTail& tail) {
    const at::Tensor& added = tail.added;
    if (!is_fast(x, groups, scale, shift, added)) {
        return group_norm_by_operators(x, groups, scale, shift, epsilon, tail);
    }
    variable_list inputs{x, scale, shift};
    if (added.defined()) inputs.push_back(added.contiguous(channels_last));
    return Fused<FusedGroupNorm>::of({groups, epsilon, tail.relu}, inputs);
}

}  // namespace microbatch
