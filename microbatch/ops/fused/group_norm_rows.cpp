#include "microbatch/ops/fused/group_norm_rows.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "microbatch/ops/kernels/kernels.h"
#include "microbatch/runtime/parallel.h"

namespace microbatch {

namespace {

const float* values(const at::Tensor& tensor) {
    return tensor.defined() ? tensor.const_data_ptr<float>() : nullptr;
}

float* mutable_values(const at::Tensor& tensor) {
    return tensor.defined() ? tensor.mutable_data_ptr<float>() : nullptr;
}

}  // namespace

at::Tensor group_norm_scratch(const GroupNormLayer& layer) {
    return at::empty({thread_places(), kernels().group_norm_scratch(layer.channels())}, layer.scale.options());
}

float* thread_row(const at::Tensor& rows) {
    return rows.mutable_data_ptr<float>() + at::get_thread_num() * rows.size(1);
}

void group_norm_forward(const GroupNormLayer& layer, const at::Tensor& x, const NormTail& tail, const at::Tensor& y,
                        const at::Tensor& statistics, float* scratch, bool again) {
    const GroupNormImages images{.samples = x.size(0),
                                 .pixels = x.size(2) * x.size(3),
                                 .channels = x.size(1),
                                 .groups = layer.groups,
                                 .epsilon = static_cast<float>(layer.epsilon),
                                 .x = values(x),
                                 .scale = values(layer.scale),
                                 .shift = values(layer.shift),
                                 .added = values(tail.added),
                                 .relu = tail.relu,
                                 .y = mutable_values(y),
                                 .statistics = mutable_values(statistics)};
    again ? kernels().group_norm_images_again(images, scratch) : kernels().group_norm_images(images, scratch);
}

void group_norm_backward(const GroupNormLayer& layer, const at::Tensor& x, const at::Tensor& y,
                         const at::Tensor& statistics, const at::Tensor& gradient, const GroupNormGradients& to,
                         float* scratch) {
    kernels().group_norm_images_backward({.samples = x.size(0),
                                          .pixels = x.size(2) * x.size(3),
                                          .channels = x.size(1),
                                          .groups = layer.groups,
                                          .x = values(x),
                                          .y = values(y),
                                          .statistics = values(statistics),
                                          .scale = values(layer.scale),
                                          .gradient = values(gradient),
                                          .grad_x = mutable_values(to.grad_x),
                                          .grad_added = mutable_values(to.grad_added),
                                          .grad_scale = to.grad_parameters,
                                          .grad_shift = to.grad_parameters + x.size(1)},
                                         scratch);
}

}  // namespace microbatch
