#include "microbatch/autograd/convolution_graph.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

namespace microbatch {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

struct Geometry {
    std::vector<std::int64_t> sizes, stride, padding, dilation;
    std::int64_t groups = 1;
};

/// A list of one number stands for all dimensions.
std::vector<std::int64_t> for_all(std::vector<std::int64_t> list, std::size_t dimensions) {
    if (list.size() == 1) list.resize(dimensions, list[0]);
    return list;
}

class ConvolutionGraph : public Function<ConvolutionGraph> {
public:
    static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& weight,
                              const std::optional<at::Tensor>& bias, const Geometry& geometry) {
        context->save_for_backward({x, weight});
        context->saved_data["stride"] = geometry.stride;
        context->saved_data["padding"] = geometry.padding;
        context->saved_data["dilation"] = geometry.dilation;
        context->saved_data["groups"] = geometry.groups;
        if (bias) context->saved_data["bias"] = bias->sizes().vec();
        return at::empty({}, x.options()).expand(geometry.sizes);
    }

    static variable_list backward(AutogradContext* context, variable_list gradients) {
        const variable_list saved = context->get_saved_variables();
        const auto list = [context](const char* name) { return context->saved_data[name].toIntVector(); };
        const bool biased = context->saved_data.count("bias") > 0;
        const std::vector<std::int64_t> bias = biased ? list("bias") : std::vector<std::int64_t>{};
        const auto stride = list("stride"), padding = list("padding"), dilation = list("dilation");
        const std::vector<std::int64_t> no_more(stride.size(), 0);
        auto [x, weight, of_bias] = at::convolution_backward(
            gradients[0], saved[0], saved[1], biased ? at::OptionalIntArrayRef(bias) : at::OptionalIntArrayRef(),
            stride, padding, dilation, /*transposed=*/false, no_more, context->saved_data["groups"].toInt(),
            std::array<bool, 3>{context->needs_input_grad(0), context->needs_input_grad(1),
                                biased && context->needs_input_grad(2)});
        return {x, weight, of_bias, at::Tensor()};
    }
};

}  // namespace

bool is_plain_convolution(const c10::OperatorHandle& op, const torch::jit::Stack& arguments) {
    const std::string& name = op.schema().name();
    return (name == "aten::conv1d" || name == "aten::conv2d" || name == "aten::conv3d") &&
           op.schema().overload_name().empty() && arguments[0].toTensor().dim() == arguments[1].toTensor().dim();
}

at::Tensor convolution_graph(const torch::jit::Stack& arguments, at::IntArrayRef sizes) {
    // input, weight, bias, stride, padding, dilation, groups
    const at::Tensor x = arguments[0].toTensor(), weight = arguments[1].toTensor();
    const bool biased = arguments[2].isTensor() && arguments[2].toTensor().defined();
    const auto bias = biased ? std::optional(arguments[2].toTensor()) : std::nullopt;
    const auto dimensions = static_cast<std::size_t>(weight.dim() - 2);
    const auto list = [&](std::size_t i) { return for_all(arguments[i].toIntVector(), dimensions); };
    const at::AutoGradMode graph(true);
    return ConvolutionGraph::apply(x, weight, bias,
                                   Geometry{sizes.vec(), list(3), list(4), list(5), arguments[6].toInt()});
}

}  // namespace microbatch
