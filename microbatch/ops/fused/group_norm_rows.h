#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "microbatch/ops/group_norm.h"

namespace microbatch {

/// The parameters of a group norm. scale and shift are [channels].
struct GroupNormLayer {
    at::Tensor scale, shift;
    std::int64_t groups = 1;
    double epsilon = 1e-5;

    std::int64_t channels() const { return scale.numel(); }
};

/// Scratch memory for the functions below, one row per torch thread: [thread_places(), ...]. Pass each its
/// thread_row().
at::Tensor group_norm_scratch(const GroupNormLayer& layer);

/// The calling thread's row of a tensor with one row of floats per torch thread.
float* thread_row(const at::Tensor& rows);

/// group_norm without autograd, in the calling thread. Requires fp32 images on the CPU with the channels of a pixel
/// side by side, and matching shapes. y is laid out like x; statistics, [samples, 2, groups], hold means and inverse
/// deviations: computed here, or used as they are where y is computed `again`.
void group_norm_forward(const GroupNormLayer& layer, const at::Tensor& x, const NormTail& tail, const at::Tensor& y,
                        const at::Tensor& statistics, float* scratch, bool again = false);

/// Where its gradients go. Images are laid out like x and must not alias an input.
struct GroupNormGradients {
    at::Tensor grad_x;
    at::Tensor grad_added = {};        ///< undefined: not needed
    float* grad_parameters = nullptr;  ///< [2, channels]: gradients of scale and shift, added to what is there
};

/// Its gradients, from that of y; y is undefined where there was no ReLU.
void group_norm_backward(const GroupNormLayer& layer, const at::Tensor& x, const at::Tensor& y,
                         const at::Tensor& statistics, const at::Tensor& gradient, const GroupNormGradients& to,
                         float* scratch);

}  // namespace microbatch
