#include "microbatch/ops/gelu.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/gelu_backward.h>
#include <torch/csrc/autograd/custom_function.h>

#include "microbatch/ops/kernels/kernels.h"
#include "microbatch/runtime/parallel.h"

namespace microbatch {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr std::int64_t grain = 16384;  // below this many elements threads do not pay

class Gelu : public torch::autograd::Function<Gelu> {
public:
    static at::Tensor forward(AutogradContext* context, const at::Tensor& x) {
        context->save_for_backward({x});
        at::Tensor y = at::empty_like(x);
        const float* from = x.const_data_ptr<float>();
        float* to = y.mutable_data_ptr<float>();
        in_parallel(x.numel(), grain, [&](std::int64_t begin, std::int64_t end) {
            kernels().gelu(from + begin, to + begin, end - begin);
        });
        return y;
    }

    static variable_list backward(AutogradContext* context, const variable_list& gradients) {
        const at::Tensor x = context->get_saved_variables()[0];
        if (at::GradMode::is_enabled()) return {at::gelu_backward(gradients[0], x, "tanh")};
        const at::Tensor gradient = gradients[0].contiguous();
        at::Tensor result = at::empty_like(x);
        const float *values = x.const_data_ptr<float>(), *factors = gradient.const_data_ptr<float>();
        float* to = result.mutable_data_ptr<float>();
        in_parallel(x.numel(), grain, [&](std::int64_t begin, std::int64_t end) {
            kernels().gelu_backward(values + begin, factors + begin, to + begin, end - begin);
        });
        return {result};
    }
};

}  // namespace

at::Tensor gelu_tanh(const at::Tensor& x) {
    const bool ours = x.is_cpu() && x.scalar_type() == at::kFloat && x.layout() == at::kStrided;
    return ours ? Gelu::apply(x.contiguous()) : at::gelu(x, "tanh");
}

}  // namespace microbatch
