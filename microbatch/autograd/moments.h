#pragma once

#include <ATen/core/Tensor.h>

namespace microbatch {

/// The count, mean and sum of squared deviations of every channel of an activation: what BatchNorm needs to know of it.
///
/// Source:  Chan, Golub & LeVeque 1979, for pooling.
/// Numerics: fp64, whatever the activation's type; a mean and a variance of one activation are as torch computes them.
struct Moments {
    double count = 0.0;    ///< values per channel
    at::Tensor mean = {};  ///< [channels], fp64
    at::Tensor m2 = {};    ///< [channels], fp64

    /// Biased, as BatchNorm normalises. Requires: count of at least 1.
    at::Tensor variance() const;
};

/// Of an activation [samples, channels, ...].
double values_per_channel(const at::Tensor& activation);

/// Of an activation [samples, channels, ...], in one pass over it. Requires: at least one value per channel.
Moments moments_of(const at::Tensor& activation);

/// Of both together. One without values changes nothing.
Moments pooled(const Moments& a, const Moments& b);

/// Moves running statistics as torch does, by the batch's mean and its unbiased variance; in place. Undefined ones are
/// left out. Requires: a count of at least 2.
void move_running_statistics(const at::Tensor& mean, const at::Tensor& variance, const Moments& batch, double momentum);

}  // namespace microbatch
