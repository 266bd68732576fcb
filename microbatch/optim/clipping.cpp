#include "microbatch/optim/clipping.h"

#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/stack.h>

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

// On the CPU, torch converts a whole tensor of another type to fp64 before it sums.
at::Tensor sum_of_squares_by_torch(const std::vector<at::Tensor>& tensors) {
    return at::stack(at::_foreach_norm(tensors, 2, at::kDouble)).square().sum();
}

double sum_of_squares_in_one_pass(const std::vector<at::Tensor>& tensors) {
    constexpr std::int64_t length = 1 << 16, grain = 1 << 15;
    std::vector<Stretch> stretches;
    std::int64_t elements = 0;
    double all = 0.0;
    for (const at::Tensor& tensor : tensors) {
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
    return all;
}

}  // namespace

at::Tensor joint_sum_of_squares(const std::vector<at::Tensor>& tensors) {
    std::vector<at::Tensor> ours;
    std::vector<std::vector<at::Tensor>> others;  // by device
    for (const at::Tensor& tensor : tensors) {
        if (in_one_pass(tensor)) {
            ours.push_back(tensor);
            continue;
        }
        const auto same = [&](const auto& group) { return group.front().device() == tensor.device(); };
        const auto group = std::find_if(others.begin(), others.end(), same);
        (group != others.end() ? *group : others.emplace_back()).push_back(tensor);
    }
    at::Tensor all = at::scalar_tensor(sum_of_squares_in_one_pass(ours), at::kDouble);
    for (const auto& group : others) {
        const at::Tensor sum = sum_of_squares_by_torch(group);
        all = others.size() == 1 ? sum + all : all + sum.cpu();
    }
    return all;
}

double joint_norm(const std::vector<at::Tensor>& tensors) {
    if (std::all_of(tensors.begin(), tensors.end(), in_one_pass)) return std::sqrt(sum_of_squares_in_one_pass(tensors));
    return std::sqrt(joint_sum_of_squares(tensors).item<double>());
}

std::vector<double> squares_of_each(const std::vector<at::Tensor>& tensors) {
    std::vector<double> squares;
    for (const at::Tensor& tensor : tensors) squares.push_back(joint_sum_of_squares({tensor}).item<double>());
    return squares;
}

double norm_of_squares(const std::vector<double>& squares) {
    double all = 0.0;
    for (const double each : squares) all += each;
    return std::sqrt(all);
}

double clip_coefficient(double norm, double limit) {
    if (std::isinf(limit)) return 1.0;
    const double ratio = limit / (norm + 1e-6);
    return ratio > 1.0 ? 1.0 : ratio;
}

}  // namespace microbatch
