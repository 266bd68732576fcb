#include "microbatch/optim/clipping.h"

#include <ATen/ops/linalg_vector_norm.h>

#include <cmath>

namespace microbatch {

double joint_norm(const std::vector<at::Tensor>& tensors) {
    double sum_of_squares = 0.0;
    for (const at::Tensor& tensor : tensors) {
        const double norm = at::linalg_vector_norm(tensor, 2, std::nullopt, false, at::kDouble).item<double>();
        sum_of_squares += norm * norm;
    }
    return std::sqrt(sum_of_squares);
}

double clip_coefficient(double norm, double limit) {
    if (std::isinf(limit)) return 1.0;
    const double ratio = limit / (norm + 1e-6);
    return ratio > 1.0 ? 1.0 : ratio;
}

}  // namespace microbatch
