#include "microbatch/step/order_free_sums.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <mutex>

#include "microbatch/optim/one_pass.h"

namespace microbatch {
namespace {

constexpr int growth = 6;  // bits: how much a gradient may exceed the range

// 1.5 * 2^52 quanta; 0 without a range.
double shift_of(double range, std::int64_t summands) {
    if (!(range > 0.0) || !std::isfinite(range)) return 0.0;
    const int bits = std::ilogb(range) + 1 + growth + std::bit_width(static_cast<std::uint64_t>(summands));
    return std::ldexp(1.5, std::clamp(bits, -900, 1000));
}

// The oracle of the kernels, and the way of other types and devices. Returns the largest magnitude.
double add_by_torch(const at::Tensor& gradient, const at::Tensor& sum, double shift) {
    const at::Tensor wide = gradient.to(at::kDouble);
    if (shift != 0.0) sum.add_((wide + shift).sub_(shift));
    return wide.numel() == 0 ? 0.0 : wide.abs().nan_to_num_(0.0, INFINITY).max().item<double>();
}

bool adds_in_one_pass(const at::Tensor& gradient, const at::Tensor& sum) {
    return updates_in_one_pass(gradient) && sum.is_cpu() && gradient.strides() == sum.strides() &&
           gradient.is_non_overlapping_and_dense();
}

double add_stretch(const at::Tensor& gradient, const at::Tensor& sum, double shift, std::int64_t begin,
                   std::int64_t end) {
    double* const to = sum.mutable_data_ptr<double>() + begin;
    const ExactKernels& exact = *kernels().exact;
    return gradient.scalar_type() == at::kFloat
               ? exact.add_rounded(gradient.const_data_ptr<float>() + begin, to, end - begin, shift)
               : exact.add_rounded_double(gradient.const_data_ptr<double>() + begin, to, end - begin, shift);
}

}  // namespace

bool exceeds(const GradientRanges& found, const GradientRanges& expected) {
    for (std::size_t i = 0; i < found.size(); ++i) {
        if (std::isfinite(found[i]) && found[i] > std::ldexp(expected[i], growth)) return true;
    }
    return false;
}

OrderFreeSums::OrderFreeSums(const Parameters& parameters, const GradientRanges& ranges, std::int64_t summands)
    : largest_(parameters.size(), 0.0) {
    for (std::size_t i = 0; i < parameters.size(); ++i) {
        sums_.push_back({parameters[i].tensor, shift_of(i < ranges.size() ? ranges[i] : 0.0, summands)});
    }
}

void OrderFreeSums::take() {
    const at::NoGradGuard no_grad;
    std::vector<std::size_t> places;
    std::vector<at::Tensor> gradients;
    for (std::size_t i = 0; i < sums_.size(); ++i) {
        Sum& one = sums_[i];
        const at::Tensor gradient = one.parameter.grad();
        if (!gradient.defined()) continue;
        one.parameter.mutable_grad() = at::Tensor();
        if (!one.sum.defined()) {
            one.sum = at::zeros_like(one.parameter, one.parameter.options().dtype(at::kDouble)).detach();
        }
        if (one.shift != 0.0 && adds_in_one_pass(gradient, one.sum)) {
            places.push_back(i);
            gradients.push_back(gradient);
        } else {
            largest_[i] = std::max(largest_[i], add_by_torch(gradient, one.sum, one.shift));
        }
    }
    std::mutex mutex;
    for_each_stretch(gradients, [&](std::size_t i, std::int64_t begin, std::int64_t end) {
        const Sum& one = sums_[places[i]];
        const double top = add_stretch(gradients[i], one.sum, one.shift, begin, end);
        const std::lock_guard lock(mutex);
        largest_[places[i]] = std::max(largest_[places[i]], top);
    });
}

GradientViews OrderFreeSums::sums() const {
    GradientViews views;
    for (const Sum& one : sums_) {
        if (one.sum.defined()) views.push_back({one.parameter, one.sum});
    }
    return views;
}

}  // namespace microbatch
