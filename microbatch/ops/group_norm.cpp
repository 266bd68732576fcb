#include "microbatch/ops/group_norm.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/group_norm.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "microbatch/autograd/differentiable.h"
#include "microbatch/autograd/sum_in_place.h"
#include "microbatch/ops/fused/group_norm_rows.h"
#include "microbatch/runtime/parallel.h"

namespace microbatch {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

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

/// x, scale, shift and, where there is one, what is added.
at::Tensor by_operators(const variable_list& inputs, std::int64_t groups, double epsilon, bool relu) {
    return group_norm_by_operators(inputs[0], groups, inputs[1], inputs[2], epsilon,
                                   {.added = inputs.size() > 3 ? inputs[3] : at::Tensor(), .relu = relu});
}

class FusedGroupNorm : public torch::autograd::Function<FusedGroupNorm> {
public:
    static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& scale,
                              const at::Tensor& shift, const std::optional<at::Tensor>& maybe_added,
                              std::int64_t groups, double epsilon, bool relu) {
        const at::Tensor added = maybe_added.value_or(at::Tensor());
        context->set_materialize_grads(false);
        const GroupNormLayer layer{scale, shift, groups, epsilon};
        at::Tensor y = at::empty_like(x);
        const at::Tensor statistics = at::empty({x.size(0), 2, groups}, x.options());
        const at::Tensor scratch = group_norm_scratch(layer);
        for_samples(x, [&](const Range& range) {
            group_norm_forward(layer, range.of(x), {.added = range.of(added), .relu = relu}, range.of(y),
                               range.of(statistics), thread_row(scratch));
        });
        context->save_for_backward({x, scale, shift, added, relu ? y : at::Tensor(), statistics});
        context->saved_data["groups"] = groups;
        context->saved_data["epsilon"] = epsilon;
        return y;
    }

    static variable_list backward(AutogradContext* context, const variable_list& gradients) {
        variable_list results(7);
        if (!gradients[0].defined()) return results;
        const variable_list saved = context->get_saved_variables();
        variable_list inputs{saved[0], saved[1], saved[2]};
        if (saved[3].defined()) inputs.push_back(saved[3]);
        const GroupNormLayer layer{saved[1], saved[2], context->saved_data["groups"].toInt(),
                                   context->saved_data["epsilon"].toDouble()};
        const bool relu = saved[4].defined();
        if (at::GradMode::is_enabled()) {
            variable_list found = differentiable_gradients(
                *context, inputs,
                [&](const variable_list& own) { return by_operators(own, layer.groups, layer.epsilon, relu); },
                gradients[0]);
            std::move(found.begin(), found.end(), results.begin());
            return results;
        }
        const bool grad_added = saved[3].defined() && context->needs_input_grad(3);
        backward_of(layer, saved, gradients[0].contiguous(channels_last), grad_added, results);
        return results;
    }

private:
    static void backward_of(const GroupNormLayer& layer, const variable_list& saved, const at::Tensor& gradient,
                            bool adds, variable_list& results) {
        const at::Tensor &x = saved[0], &y = saved[4], &statistics = saved[5];
        const at::Tensor grad_x = at::empty_like(x);
        // Without ReLU the gradient of what was added is that of y.
        const at::Tensor grad_added = adds && y.defined() ? at::empty_like(x) : at::Tensor();
        const at::Tensor scratch = group_norm_scratch(layer);
        const std::int64_t channels = layer.channels();
        const at::Tensor sums = at::zeros({thread_places(), 2 * channels}, x.options());
        for_samples(x, [&](const Range& range) {
            group_norm_backward(layer, range.of(x), range.of(y), range.of(statistics), range.of(gradient),
                                {range.of(grad_x), range.of(grad_added), thread_row(sums)}, thread_row(scratch));
        });
        results[0] = grad_x;
        results[1] = sums.narrow(1, 0, channels).sum(0);
        results[2] = sums.narrow(1, channels, channels).sum(0);
        if (adds) results[3] = grad_added.defined() ? grad_added : gradient;
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
    const auto maybe_added = added.defined() ? std::optional(added.contiguous(channels_last)) : std::nullopt;
    return FusedGroupNorm::apply(x, scale, shift, maybe_added, groups, epsilon, tail.relu);
}

}  // namespace microbatch
