#include "microbatch/optim/clipping.h"

#include <ATen/ops/linalg_vector_norm.h>

#include <algorithm>
#include <cmath>

#include "microbatch/ops/kernels/kernels.h"
#include "microbatch/runtime/parallel.h"

namespace microbatch {
namespace {

/// A part of a tensor small enough for the threads to share the work evenly.
struct Stretch {
    const at::Tensor* tensor;
    std::int64_t begin, end;

    double sum_of_squares() const {
        const ExactKernels& exact = *kernels().exact;
        return tensor->scalar_type() == at::kFloat
                   ? exact.sum_of_squares(tensor->const_data_ptr<float>() + begin, end - begin)
                   : exact.sum_of_squares_double(tensor->const_data_ptr<double>() + begin, end - begin);
    }
};

bool in_one_pass(const at::Tensor& tensor) {
    return tensor.is_cpu() && tensor.is_non_overlapping_and_dense() &&
           (tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble);
}

// torch converts a whole tensor of another type to fp64 before it sums.
double by_torch(const at::Tensor& tensor) {
    const double norm = at::linalg_vector_norm(tensor, 2, std::nullopt, false, at::kDouble).item<double>();
    return norm * norm;
}

}  // namespace

double joint_norm(const std::vector<at::Tensor>& tensors) {
    constexpr std::int64_t length = 1 << 16, grain = 1 << 15;
    std::vector<Stretch> stretches;
    std::int64_t elements = 0;
    double all = 0.0;
    for (const at::Tensor& tensor : tensors) {
        if (!in_one_pass(tensor)) {
            all += by_torch(tensor);
            continue;
        }
        elements += tensor.numel();
        for (std::int64_t begin = 0; begin < tensor.numel(); begin += length) {
            stretches.push_back({&tensor, begin, std::min(begin + length, tensor.numel())});
        }
    }
    std::vector<double> sums(stretches.size());
    const auto count = static_cast<std::int64_t>(stretches.size());
    in_parallel(count, elements < grain ? count + 1 : 0, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) sums[i] = stretches[i].sum_of_squares();
    });
    for (const double each : sums) all += each;
    return std::sqrt(all);
}

double clip_coefficient(double norm, double limit) {
    if (std::isinf(limit)) return 1.0;
    const double ratio = limit / (norm + 1e-6);
    return ratio > 1.0 ? 1.0 : ratio;
}

}  // namespace microbatch
