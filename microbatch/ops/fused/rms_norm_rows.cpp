#include "microbatch/ops/fused/rms_norm_rows.h"

namespace microbatch {

void RmsNorm::forward(RowRange rows, const at::Tensor& x, const at::Tensor& y) const {
    const std::int64_t width = scale.numel(), begin = rows.begin * width;
    kernels().rms_norm_rows({.rows = rows.count(),
                             .width = width,
                             .epsilon = static_cast<float>(epsilon),
                             .x = floats(x) + begin,
                             .scale = floats(scale),
                             .y = mutable_floats(y) + begin,
                             .inverses = inverses + rows.begin});
}

void RmsNorm::backward(RowRange rows, const at::Tensor& x, const RmsNormGradients& of) const {
    const std::int64_t width = scale.numel(), begin = rows.begin * width;
    kernels().rms_norm_rows_backward({.rows = rows.count(),
                                      .width = width,
                                      .x = floats(x) + begin,
                                      .inverses = inverses + rows.begin,
                                      .scale = floats(scale),
                                      .gradient = floats(of.gradient) + begin,
                                      .residual = of.residual.defined() ? floats(of.residual) + begin : nullptr,
                                      .grad_x = mutable_floats(of.grad_x) + begin,
                                      .y = of.y.defined() ? mutable_floats(of.y) + begin : nullptr,
                                      .grad_scale = of.grad_scale});
}

}  // namespace microbatch
