#include "microbatch/ops/rms_norm.h"

#include <ATen/autocast_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/rsqrt.h>

#include <algorithm>
#include <cstdint>

#include "microbatch/autograd/fused.h"
#include "microbatch/autograd/sum_in_place.h"
#include "microbatch/core/error.h"
#include "microbatch/ops/fused/rms_norm_rows.h"

namespace microbatch {

namespace {

constexpr std::int64_t grain = 16384;  // below this many numbers threads do not pay

template <class Work>
void for_rows(const at::Tensor& x, const Work& work) {
    const std::int64_t width = x.size(-1);
    in_parallel(x.numel() / width, std::max<std::int64_t>(grain / width, 1), [&](std::int64_t begin, std::int64_t end) {
        work(RowRange{begin, end});
    });
}

/// Of x and scale.
struct FusedRmsNorm {
    double epsilon;

    FusedResult forward(const variable_list& inputs) const {
        const at::Tensor &x = inputs[0], &scale = inputs[1];
        at::Tensor y = at::empty_like(x);
        const at::Tensor statistics = at::empty({x.numel() / x.size(-1)}, x.options());
        const RmsNorm norm{scale, epsilon, mutable_floats(statistics)};
        for_rows(x, [&](RowRange mine) { norm.forward(mine, x, y); });
        return {y, {statistics}};
    }

    variable_list backward(const FusedBackward& of) const {
        const at::Tensor &x = of.inputs[0], &scale = of.inputs[1];
        const at::Tensor gradient = of.gradient.contiguous();
        const RmsNorm norm{scale, epsilon, mutable_floats(of.saved[0])};
        at::Tensor grad_x = at::empty_like(x);
        RowTotals grad_scale(scale.numel());
        for_rows(x, [&](RowRange mine) {
            grad_scale.of(mine, [&](RowRange some, float* sums) {
                norm.backward(some, x, {.gradient = gradient, .grad_x = grad_x, .grad_scale = sums});
            });
        });
        return {grad_x, grad_scale.total()};
    }

    at::Tensor by_operators(const variable_list& inputs) const {
        return rms_norm_by_operators(inputs[0], inputs[1], epsilon);
    }
};

bool is_fast(const at::Tensor& x, const at::Tensor& scale) {
    return is_fp32_on_cpu(x) && is_fp32_on_cpu(scale) && x.numel() > 0 && scale.is_contiguous() &&
           !operators_are_watched() && !at::autocast::is_autocast_enabled(at::kCPU);
}

}  // namespace

at::Tensor rms_norm_by_operators(const at::Tensor& x, const at::Tensor& scale, double epsilon) {
    const at::Tensor wide = at::isReducedFloatingType(x.scalar_type()) ? x.to(at::kFloat) : x;
    const at::Tensor normed = wide * at::rsqrt(wide.square().mean(-1, /*keepdim=*/true) + epsilon);
    return normed.to(x.scalar_type()) * scale;
}

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& scale, double epsilon) {
    require_that(x.dim() >= 1 && scale.sizes() == at::IntArrayRef{x.size(-1)}, "rms_norm: x is of shape ", x.sizes(),
                 " and scale of shape ", scale.sizes(), "; give [..., width] and [width]");
    if (!is_fast(x, scale)) return rms_norm_by_operators(x, scale, epsilon);
    return Fused<FusedRmsNorm>::of({epsilon}, {x.contiguous(), scale});
}

}  // namespace microbatch
