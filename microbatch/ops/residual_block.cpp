#include "microbatch/ops/residual_block.h"

#include <ATen/autocast_mode.h>

#include <tuple>
#include <vector>

#include "microbatch/autograd/fused.h"
#include "microbatch/autograd/sum_in_place.h"
#include "microbatch/ops/fused/residual.h"
#include "microbatch/ops/group_norm.h"
#include "microbatch/runtime/parallel.h"

namespace microbatch {

namespace {

constexpr auto channels_last = at::MemoryFormat::ChannelsLast;

/// From inputs of which the first is x; the projection's may be missing.
ResidualWeights weights_of(const variable_list& v) {
    ResidualWeights weights{v[1], v[2], v[3], v[4], v[5], v[6]};
    if (v.size() > 7)
        std::tie(weights.projection, weights.projection_scale, weights.projection_shift) = std::tie(v[7], v[8], v[9]);
    return weights;
}

struct FusedResidual {
    ResidualOptions options;

    FusedResult forward(const variable_list& inputs) const {
        auto [out, parts] = residual_forward(inputs[0], weights_of(inputs), options);
        FusedResult result{out, {out}};
        for (const ResidualSaved& part : parts) {
            result.saved.insert(result.saved.end(), {part.first, part.second, part.projected, part.statistics});
        }
        return result;
    }

    variable_list backward(const FusedBackward& of) const {
        std::vector<ResidualSaved> parts;
        for (std::size_t i = 1; i < of.saved.size(); i += 4) {
            parts.push_back({of.saved[i], of.saved[i + 1], of.saved[i + 2], of.saved[i + 3]});
        }
        const ResidualWanted wanted{.x = of.needed[0],
                                    .first = of.needed[1],
                                    .second = of.needed[4],
                                    .projection = of.needed.size() > 7 && of.needed[7]};
        return residual_backward(of.inputs[0], weights_of(of.inputs), options, of.saved[0], parts,
                                 of.gradient.contiguous(channels_last), wanted);
    }

    at::Tensor by_operators(const variable_list& inputs) const {
        return residual_block_by_operators(inputs[0], weights_of(inputs), options);
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
    variable_list inputs{x, w.first, w.first_scale, w.first_shift, w.second, w.second_scale, w.second_shift};
    if (w.projection.defined()) {
        inputs.insert(inputs.end(), {w.projection, w.projection_scale, w.projection_shift});
    }
    return Fused<FusedResidual>::of({options}, inputs);
}

}  // namespace microbatch
