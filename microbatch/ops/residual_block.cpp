#include "microbatch/ops/residual_block.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "microbatch/autograd/differentiable.h"
#include "microbatch/autograd/sum_in_place.h"
#include "microbatch/ops/fused/residual.h"
#include "microbatch/ops/group_norm.h"
#include "microbatch/runtime/parallel.h"

namespace microbatch {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Maybe = std::optional<at::Tensor>;

constexpr auto channels_last = at::MemoryFormat::ChannelsLast;

/// From variables of which the first is x; the projection's may be missing.
ResidualWeights weights_of(const variable_list& v) {
    ResidualWeights weights{v[1], v[2], v[3], v[4], v[5], v[6]};
    if (v.size() > 7)
        std::tie(weights.projection, weights.projection_scale, weights.projection_shift) = std::tie(v[7], v[8], v[9]);
    return weights;
}

class FusedResidual : public torch::autograd::Function<FusedResidual> {
public:
    static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& w1, const at::Tensor& w2,
                              const at::Tensor& w3, const at::Tensor& w4, const at::Tensor& w5, const at::Tensor& w6,
                              const Maybe& w7, const Maybe& w8, const Maybe& w9, std::int64_t stride,
                              std::int64_t groups, double epsilon) {
        context->set_materialize_grads(false);
        variable_list inputs{x, w1, w2, w3, w4, w5, w6};
        if (w7) inputs.insert(inputs.end(), {*w7, *w8, *w9});
        auto [out, saved] = residual_forward(x, weights_of(inputs), {stride, groups, epsilon});
        context->saved_data["inputs"] = static_cast<std::int64_t>(inputs.size());
        variable_list tensors = std::move(inputs);
        tensors.push_back(out);
        for (const ResidualSaved& part : saved) {
            tensors.insert(tensors.end(), {part.first, part.second, part.projected, part.statistics});
        }
        context->save_for_backward(std::move(tensors));
        context->saved_data["stride"] = stride;
        context->saved_data["groups"] = groups;
        context->saved_data["epsilon"] = epsilon;
        return out;
    }

    static variable_list backward(AutogradContext* context, const variable_list& gradients) {
        variable_list results(13);
        if (!gradients[0].defined()) return results;
        const variable_list tensors = context->get_saved_variables();
        const auto count = static_cast<std::size_t>(context->saved_data["inputs"].toInt());
        const variable_list inputs(tensors.begin(), tensors.begin() + static_cast<std::ptrdiff_t>(count));
        const ResidualOptions options{context->saved_data["stride"].toInt(), context->saved_data["groups"].toInt(),
                                      context->saved_data["epsilon"].toDouble()};
        if (at::GradMode::is_enabled()) {
            variable_list found = differentiable_gradients(
                *context, inputs,
                [&](const variable_list& own) { return residual_block_by_operators(own[0], weights_of(own), options); },
                gradients[0]);
            std::move(found.begin(), found.end(), results.begin());
            return results;
        }
        std::vector<ResidualSaved> saved;
        for (std::size_t i = count + 1; i < tensors.size(); i += 4) {
            saved.push_back({tensors[i], tensors[i + 1], tensors[i + 2], tensors[i + 3]});
        }
        const ResidualWanted wanted{.x = context->needs_input_grad(0),
                                    .first = context->needs_input_grad(1),
                                    .second = context->needs_input_grad(4),
                                    .projection = count > 7 && context->needs_input_grad(7)};
        variable_list found = residual_backward(inputs[0], weights_of(inputs), options, tensors[count], saved,
                                                gradients[0].contiguous(channels_last), wanted);
        std::move(found.begin(), found.end(), results.begin());
        return results;
    }
};

/// A convolution to `outputs` channels and its norm, that fit together.
bool is_normed(const at::Tensor& weight, const at::Tensor& scale, const at::Tensor& shift, std::int64_t inputs,
               std::int64_t outputs) {
    const auto is_of_outputs = [&](const at::Tensor& one) {
        return is_fp32_on_cpu(one) && one.is_contiguous() && one.sizes() == at::IntArrayRef{outputs};
    };
    return is_fp32_on_cpu(weight) && weight.dim() == 4 && weight.size(0) == outputs && weight.size(1) == inputs &&
           weight.size(2) == weight.size(3) && weight.size(2) % 2 == 1 && is_of_outputs(scale) && is_of_outputs(shift);
}

/// True if the fused version supports these shapes and types; otherwise torch's operators report what is wrong.
bool is_fast(const at::Tensor& x, const ResidualWeights& w, const ResidualOptions& options) {
    // Of one channel both layouts are the same, and the convolution may take it for the other one.
    if (!is_fp32_on_cpu(x) || x.dim() != 4 || x.numel() == 0 || x.size(1) == 1 || !x.is_contiguous(channels_last) ||
        !OneThread::possible() || operators_are_watched() || at::autocast::is_autocast_enabled(at::kCPU) ||
        !w.first.defined() || w.first.dim() != 4) {
        return false;
    }
    const std::int64_t inputs = x.size(1), outputs = w.first.size(0);
    const bool projects = w.projection.defined();
    return options.stride >= 1 && options.groups >= 1 && outputs % options.groups == 0 &&
           is_normed(w.first, w.first_scale, w.first_shift, inputs, outputs) &&
           is_normed(w.second, w.second_scale, w.second_shift, outputs, outputs) &&
           (projects ? is_normed(w.projection, w.projection_scale, w.projection_shift, inputs, outputs)
                     : inputs == outputs && options.stride == 1);
}

}  // namespace

at::Tensor residual_block_by_operators(const at::Tensor& x, const ResidualWeights& w, const ResidualOptions& options) {
    const auto norm = [&](const at::Tensor& y, const at::Tensor& scale, const at::Tensor& shift, const NormTail& tail) {
        return group_norm(y, options.groups, scale, shift, options.epsilon, tail);
    };
    const at::Tensor shortcut = w.projection.defined() ? norm(convolution(x, w.projection, options.stride),
                                                              w.projection_scale, w.projection_shift, {})
                                                       : x;
    const at::Tensor inner =
        norm(convolution(x, w.first, options.stride), w.first_scale, w.first_shift, {.relu = true});
    return norm(convolution(inner, w.second, 1), w.second_scale, w.second_shift, {.added = shortcut, .relu = true});
}

at::Tensor residual_block(const at::Tensor& x, const ResidualWeights& w, const ResidualOptions& options) {
    if (!is_fast(x, w, options)) return residual_block_by_operators(x, w, options);
    const auto maybe = [&](const at::Tensor& one) { return w.projection.defined() ? Maybe(one) : std::nullopt; };
    return FusedResidual::apply(x, w.first, w.first_scale, w.first_shift, w.second, w.second_scale, w.second_shift,
                                maybe(w.projection), maybe(w.projection_scale), maybe(w.projection_shift),
                                options.stride, options.groups, options.epsilon);
}

}  // namespace microbatch
