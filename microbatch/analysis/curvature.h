#pragma once

#include <cstdint>
#include <vector>

#include "microbatch/data/batch_source.h"
#include "microbatch/model/parameters.h"
#include "microbatch/step/loss.h"

namespace microbatch {

struct LanczosOptions {
    std::int64_t most_products = 40;
    double tolerance = 1e-5;  ///< relative to the eigenvalue
    std::uint64_t seed = 0;   ///< of the first vector
};

/// The top of the Hessian's spectrum.
struct Curvature {
    double largest_eigenvalue = 0.0;  ///< of the mean loss's Hessian; the largest value, not the largest magnitude
    double residual = 0.0;            ///< an upper bound of the eigenvalue's error
    std::int64_t products = 0;        ///< the number of Hessian-vector products
    bool converged = false;           ///< the residual is within the tolerance
};

/// Largest eigenvalue of the Hessian of the batch's mean loss. Hessian-vector products are summed over micro-batches
/// with the same weights as gradients.
///
/// The loss function must be twice differentiable and deterministic: put the model in evaluation mode, so that there is
/// no dropout, and BatchNorm is a fixed map.
///
/// Source:  Lanczos 1950 without reorthogonalisation (Paige 1972: the extreme eigenvalues remain accurate);
///          Hessian-vector products by two backward passes (Pearlmutter 1994).
/// Errors:  ErrorKind::usage if no parameter requires a gradient, the weight is 0, micro_batch < 1, or a product is not
///          finite.
/// State:   parameters and gradients unchanged. Memory: four copies of the parameters, and two graphs of a micro-batch.
/// Threads: no other thread may use the model meanwhile.
/// Cost:    one product costs about three gradients.
Curvature largest_curvature(const Parameters& parameters, const BatchSource& batch, std::int64_t micro_batch,
                            const LossFunction& loss, const LanczosOptions& options = {});
inline Curvature largest_curvature(const Parameters& parameters, const Batch& batch, std::int64_t micro_batch,
                                   const LossFunction& loss, const LanczosOptions& options = {}) {
    return largest_curvature(parameters, TensorBatch(batch), micro_batch, loss, options);
}

/// Mean loss of the batch at parameters + distance * direction, for each distance. The direction is random; each filter
/// (a row of a tensor with two or more dimensions) has the norm of the parameters' own; other tensors do not change.
///
/// So two minima can be compared although their weights differ in scale: where the loss rises steeply, the minimum is
/// sharp.
///
/// Source:  Li et al. 2018, arXiv:1712.09913, section 4.
/// Errors:  ErrorKind::usage if the weight is 0 or micro_batch < 1.
/// State:   parameters are unchanged, bit for bit, even after an exception. Memory: two copies of the parameters.
/// Threads: no other thread may use the model meanwhile.
std::vector<double> losses_along(const Parameters& parameters, const std::vector<double>& distances, std::uint64_t seed,
                                 const BatchSource& batch, std::int64_t micro_batch, const LossFunction& loss);
inline std::vector<double> losses_along(const Parameters& parameters, const std::vector<double>& distances,
                                        std::uint64_t seed, const Batch& batch, std::int64_t micro_batch,
                                        const LossFunction& loss) {
    return losses_along(parameters, distances, seed, TensorBatch(batch), micro_batch, loss);
}

}  // namespace microbatch
