#include "microbatch/autograd/moments.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/batch_norm_update_stats.h>

#include "microbatch/autograd/buffers.h"

namespace microbatch {
namespace {

void move(const at::Tensor& running, const at::Tensor& to, double momentum) {
    if (!running.defined()) return;
    overwrite_buffer(running, running.to(at::kDouble) * (1.0 - momentum) + to * momentum);
}

}  // namespace

double values_per_channel(const at::Tensor& activation) {
    return static_cast<double>(activation.numel()) / static_cast<double>(activation.size(1));
}

at::Tensor Moments::variance() const {
    return m2 / count;
}

Moments moments_of(const at::Tensor& activation) {
    const at::NoGradGuard no_grad;
    const bool half = activation.element_size() < 4;  // torch would round the statistics to the same type
    const at::Tensor x = half ? activation.detach().to(at::kFloat) : activation.detach();
    const auto [mean, variance] = at::batch_norm_update_stats(x, {}, {}, /*momentum=*/0.0);
    const double count = values_per_channel(activation);
    return {count, mean.to(at::kDouble), variance.to(at::kDouble) * count};
}

Moments pooled(const Moments& a, const Moments& b) {
    if (a.count == 0.0) return b;
    if (b.count == 0.0) return a;
    const at::NoGradGuard no_grad;
    const double count = a.count + b.count;
    const at::Tensor apart = b.mean - a.mean;
    return {count, a.mean + apart * (b.count / count), a.m2 + b.m2 + apart.square() * (a.count * b.count / count)};
}

void move_running_statistics(const at::Tensor& mean, const at::Tensor& variance, const Moments& batch,
                             double momentum) {
    const at::NoGradGuard no_grad;
    move(mean, batch.mean, momentum);
    move(variance, batch.m2 / (batch.count - 1.0), momentum);
}

}  // namespace microbatch
