#include "microbatch/step/batch_totals.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/minimum.h>
#include <ATen/ops/stack.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "microbatch/core/error.h"

namespace microbatch {
namespace {

// The sum so far is a number until the first value on a device, and has the bits of a sum in order.
void add_to(at::Tensor& on_device, double so_far, const at::Tensor& value) {
    on_device = on_device.defined() ? on_device.add(value) : value.add(so_far);
}

void require_finite_sum(double weight) {
    require_that(std::isfinite(weight),
                 "the sum of the weights of the batch exceeds the range of a double; scale them down");
}

}  // namespace

std::vector<double> numbers_in(const std::vector<at::Tensor>& tensors) {
    const at::NoGradGuard no_grad;
    std::vector<double> numbers;
    std::vector<at::Tensor> values;
    for (const at::Tensor& tensor : tensors) values.push_back(tensor.detach().to(at::kDouble).reshape({}));
    const auto elsewhere = [&](const at::Tensor& one) { return one.device() != values.front().device(); };
    if (values.empty() || values.front().is_cpu() || std::any_of(values.begin(), values.end(), elsewhere)) {
        for (const at::Tensor& value : values) numbers.push_back(value.item<double>());
        return numbers;
    }
    const at::Tensor all = at::stack(values).cpu();
    const auto* const first = all.const_data_ptr<double>();
    return {first, first + all.numel()};
}

void BatchTotals::count(const Weight& weight) {
    if (weight.is_known() && !weight_on_device_.defined()) {
        weight_ += weight.value();
        require_finite_sum(weight_);
        return;
    }
    if (weight.is_known()) {
        weight_on_device_ = weight_on_device_.add(weight.value());
        return;
    }
    add_to(weight_on_device_, weight_, weight.on_device());
    least_weight_ = least_weight_.defined() ? at::minimum(least_weight_, weight.on_device()) : weight.on_device();
}

void BatchTotals::add(const WeightedLoss& loss, const at::Tensor& squared_norm) {
    const at::Tensor sum = loss.sum.detach().to(at::kDouble).reshape({});
    if (sum.is_cpu() && !loss_on_device_.defined()) {
        loss_sum_ += sum.item<double>();
    } else {
        add_to(loss_on_device_, loss_sum_, sum);
    }
    if (squared_norm.defined()) unread_parts_.push_back({loss.weight, squared_norm});
}

void BatchTotals::read() {
    std::vector<at::Tensor> unread;
    if (loss_on_device_.defined()) unread.push_back(loss_on_device_);
    if (weight_on_device_.defined()) unread.insert(unread.end(), {weight_on_device_, least_weight_});
    for (const Part& part : unread_parts_) {
        unread.push_back(part.squared_norm);
        if (!part.weight.is_known()) unread.push_back(part.weight.on_device());
    }
    const std::vector<double> numbers = numbers_in(unread);
    auto next = numbers.begin();
    if (loss_on_device_.defined()) loss_sum_ = *next++;
    if (weight_on_device_.defined()) {
        weight_ = *next++;
        const double least = *next++;
        require_weight(least);
        require_finite_sum(weight_);
    }
    for (const Part& part : unread_parts_) {
        const double squared_norm = *next++, weight = part.weight.is_known() ? part.weight.value() : *next++;
        if (weight > 0.0) parts_.add({weight, squared_norm / (weight * weight)});
    }
    // The sign of NaN is meaningless, and would be printed.
    if (std::isnan(loss_sum_)) loss_sum_ = std::numeric_limits<double>::quiet_NaN();
    loss_on_device_ = weight_on_device_ = least_weight_ = at::Tensor();
    unread_parts_.clear();
}

}  // namespace microbatch
