#include "microbatch/nn/group_norm.h"

#include <ATen/Parallel.h>
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

#include "microbatch/nn/differentiable.h"
#include "microbatch/nn/in_parallel.h"
#include "microbatch/nn/kernels/kernels.h"
#include "microbatch/nn/sum_in_place.h"

namespace microbatch {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr auto channels_last = at::MemoryFormat::ChannelsLast;
constexpr std::int64_t grain = 16384;  // numbers from which on threads pay

/// Calls call(begin, end, row) for ranges of samples, row being that of the thread in `own`, [thread_places(), ...].
template <class Call>
void for_samples(const at::Tensor& x, const at::Tensor& own, const Call& call) {
    float* rows = own.mutable_data_ptr<float>();
    const std::int64_t size = own.size(1);
    in_parallel(x.size(0), std::max<std::int64_t>(grain / x[0].numel(), 1),
                [&](std::int64_t begin, std::int64_t end) { call(begin, end, rows + at::get_thread_num() * size); });
}

const float* at_offset(const at::Tensor& tensor, std::int64_t offset) {
    return tensor.defined() ? tensor.const_data_ptr<float>() + offset : nullptr;
}

float* mutable_at_offset(const at::Tensor& tensor, std::int64_t offset) {
    return tensor.defined() ? tensor.mutable_data_ptr<float>() + offset : nullptr;
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
        const std::int64_t pixels = x.size(2) * x.size(3), channels = x.size(1);
        at::Tensor y = at::empty_like(x);
        const at::Tensor statistics = at::empty({x.size(0), 2, groups}, x.options());
        const at::Tensor scratch = at::empty({thread_places(), kernels().group_norm_scratch(channels)}, x.options());
        for_samples(x, scratch, [&](std::int64_t begin, std::int64_t end, float* own) {
            const std::int64_t first = begin * pixels * channels;
            kernels().group_norm_images({.samples = end - begin,
                                         .pixels = pixels,
                                         .channels = channels,
                                         .groups = groups,
                                         .epsilon = static_cast<float>(epsilon),
                                         .x = at_offset(x, first),
                                         .scale = at_offset(scale, 0),
                                         .shift = at_offset(shift, 0),
                                         .added = at_offset(added, first),
                                         .relu = relu,
                                         .y = mutable_at_offset(y, first),
                                         .statistics = mutable_at_offset(statistics, 2 * groups * begin)},
                                        own);
        });
        context->save_for_backward({x, scale, shift, added, relu ? y : at::Tensor(), statistics});
        context->saved_data["groups"] = groups;
        context->saved_data["epsilon"] = epsilon;
        context->saved_data["relu"] = relu;
        return y;
    }

    static variable_list backward(AutogradContext* context, const variable_list& gradients) {
        variable_list results(7);
        if (!gradients[0].defined()) return results;
        const variable_list saved = context->get_saved_variables();
        variable_list inputs{saved[0], saved[1], saved[2]};
        if (saved[3].defined()) inputs.push_back(saved[3]);
        if (at::GradMode::is_enabled()) {
            const std::int64_t groups = context->saved_data["groups"].toInt();
            const double epsilon = context->saved_data["epsilon"].toDouble();
            const bool relu = context->saved_data["relu"].toBool();
            variable_list found = differentiable_gradients(
                *context, inputs, [&](const variable_list& own) { return by_operators(own, groups, epsilon, relu); },
                gradients[0]);
            std::move(found.begin(), found.end(), results.begin());
            return results;
        }
        const bool of_added = saved[3].defined() && context->needs_input_grad(3);
        backward_of(saved, gradients[0].contiguous(channels_last), of_added, results);
        return results;
    }

private:
    static void backward_of(const variable_list& saved, const at::Tensor& gradient, bool adds, variable_list& results) {
        const at::Tensor &x = saved[0], &scale = saved[1], &y = saved[4], &statistics = saved[5];
        const std::int64_t pixels = x.size(2) * x.size(3), channels = x.size(1), groups = statistics.size(2);
        const at::Tensor of_x = at::empty_like(x);
        // Without ReLU the gradient goes on to what was added as it is.
        const at::Tensor of_added = adds && y.defined() ? at::empty_like(x) : at::Tensor();
        // Of each thread: the gradients of scale and shift, then scratch.
        const at::Tensor own =
            at::zeros({thread_places(), 2 * channels + kernels().group_norm_scratch(channels)}, x.options());
        for_samples(x, own, [&](std::int64_t begin, std::int64_t end, float* row) {
            const std::int64_t first = begin * pixels * channels;
            kernels().group_norm_images_backward({.samples = end - begin,
                                                  .pixels = pixels,
                                                  .channels = channels,
                                                  .groups = groups,
                                                  .x = at_offset(x, first),
                                                  .y = at_offset(y, first),
                                                  .statistics = at_offset(statistics, 2 * groups * begin),
                                                  .scale = at_offset(scale, 0),
                                                  .gradient = at_offset(gradient, first),
                                                  .of_x = mutable_at_offset(of_x, first),
                                                  .of_added = mutable_at_offset(of_added, first),
                                                  .of_scale = row,
                                                  .of_shift = row + channels},
                                                 row + 2 * channels);
        });
        results[0] = of_x;
        results[1] = own.narrow(1, 0, channels).sum(0);
        results[2] = own.narrow(1, channels, channels).sum(0);
        if (adds) results[3] = of_added.defined() ? of_added : gradient;
    }
};

bool is_fp32_on_cpu(const at::Tensor& tensor) {
    return is_plain(tensor) && tensor.is_cpu() && tensor.scalar_type() == at::kFloat;
}

/// Whether shapes and types are those of the fast way; if they are not, the operators say what is wrong.
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
