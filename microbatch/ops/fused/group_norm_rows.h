#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "microbatch/ops/group_norm.h"

namespace microbatch {

/// What a group norm has beside its input. scale and shift are [channels].
struct GroupNormLayer {
    at::Tensor scale, shift;
    std::int64_t groups = 1;
    double epsilon = 1e-5;

    std::int64_t channels() const { return scale.numel(); }
};

/// Scratch for the passes below, a row for each of torch's threads: [thread_places(), ...]. Give them their
/// thread_row().
at::Tensor group_norm_scratch(const GroupNormLayer& layer);

/// The row of the calling thread in rows of floats, one for each of torch's threads.
float* thread_row(const at::Tensor& rows);

/// group_norm without autograd, in the calling thread: fp32 images on the CPU with the channels of a pixel side by
/// side, everything of fitting shapes. y is as x; statistics, [samples, 2, groups], hold means and inverse deviations:
/// they are made, or taken as they are where y is made `again`.
void group_norm_forward(const GroupNormLayer& layer, const at::Tensor& x, const NormTail& tail, const at::Tensor& y,
                        const at::Tensor& statistics, float* scratch, bool again = false);

/// Where its gradients go. Images are as x and none of the inputs.
struct GroupNormGradients {
    at::Tensor grad_x;
    at::Tensor grad_added = {};        ///< undefined: not wanted
    float* grad_parameters = nullptr;  ///< [2, channels]: those of scale and shift are added
};

/// Its gradient, from that of y; y is undefined where there was no ReLU.
void group_norm_backward(const GroupNormLayer& layer, const at::Tensor& x, const at::Tensor& y,
                         const at::Tensor& statistics, const at::Tensor& gradient, const GroupNormGradients& to,
                         float* scratch);

}  // namespace microbatch
