#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "microbatch/ops/fused/rows.h"

namespace microbatch {

/// What RmsNorm::backward reads and writes; every tensor has the shape of x.
struct RmsNormGradients {
    at::Tensor gradient;       ///< of y
    at::Tensor grad_x;         ///< may be gradient
    at::Tensor residual = {};  ///< a gradient that is added to that of x, or undefined
    at::Tensor y = {};         ///< computed again, unless undefined
    float* grad_scale = nullptr;
};

/// RMS norm of ranges of rows.
struct RmsNorm {
    const at::Tensor& scale;
    double epsilon;
    float* inverses;  ///< [rows]: inverse root mean squares, which forward writes

    void forward(RowRange rows, const at::Tensor& x, const at::Tensor& y) const;
    void backward(RowRange rows, const at::Tensor& x, const RmsNormGradients& of) const;
};

}  // namespace microbatch
