#pragma once

#include <cstdint>
#include <functional>

#include "microbatch/step/gatherer.h"

namespace microbatch {

/// How much the mean gradient of a batch varies from batch to batch at the same parameters.
struct GradientVariance {
    double variance = 0.0;      ///< trace of the covariance: E |g - E g|^2
    double mean_squared = 0.0;  ///< |mean of the g|^2, of which variance / batches is noise
    std::int64_t batches = 0;
};

/// Measures it over `batches` batches, which `next` returns one after the other.
///
/// Formula:  (sum |g_r|^2 - |sum g_r|^2 / R) / (R - 1), the unbiased sample variance, R = batches;
///           0 where rounding would make it negative.
/// Errors:   ErrorKind::usage if batches < 2, or a batch has weight 0; as Gatherer's.
/// State:    parameters unchanged, gradients cleared. Memory: a copy of the gradients in fp64.
/// Cost:     one gather per batch.
GradientVariance gradient_variance(const Parameters& parameters, std::int64_t batches,
                                   const std::function<Batch()>& next, const Plan& plan, const LossFunction& loss);

}  // namespace microbatch
