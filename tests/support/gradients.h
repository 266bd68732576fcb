#pragma once

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cstring>
#include <string>
#include <vector>

#include "microbatch/model/parameters.h"
#include "microbatch/step/loss.h"

namespace microbatch::test {

/// Tensors by the name of the parameter they belong to; undefined where a parameter has no gradient.
using Named = std::vector<Parameter>;

inline Named values_of(const Parameters& parameters) {
    Named values;
    for (const Parameter& p : parameters) values.push_back({p.name, p.tensor.detach().clone()});
    return values;
}

/// The gradients as they stand, divided by `divisor`.
inline Named gradients_of(const Parameters& parameters, double divisor = 1.0) {
    Named gradients;
    for (const Parameter& p : parameters) {
        const at::Tensor& gradient = p.tensor.grad();
        gradients.push_back({p.name, gradient.defined() ? gradient.detach() / divisor : at::Tensor()});
    }
    return gradients;
}

inline void clear_gradients(const Parameters& parameters) {
    for (const Parameter& p : parameters) p.tensor.mutable_grad() = at::Tensor();
}

/// The oracle: one backward of the mean loss of the whole batch, in plain torch. Leaves no gradient behind.
inline Named oracle_gradients(const Parameters& parameters, const Batch& batch, const LossFunction& loss) {
    clear_gradients(parameters);
    const WeightedLoss whole = loss(batch);
    (whole.sum / whole.weight.value()).backward();
    Named gradients = gradients_of(parameters);
    clear_gradients(parameters);
    return gradients;
}

/// Norm of the difference over the norm of `right`, in fp64; 0 if both are zero.
inline double relative_difference(const at::Tensor& left, const at::Tensor& right) {
    const at::Tensor one = left.to(at::kCPU, at::kDouble), other = right.to(at::kCPU, at::kDouble);
    const double difference = (one - other).norm().item<double>();
    return difference == 0.0 ? 0.0 : difference / other.norm().item<double>();
}

/// The largest relative difference of any tensor.
inline double largest_difference(const Named& left, const Named& right) {
    double largest = 0.0;
    for (std::size_t i = 0; i < left.size(); ++i) {
        largest = std::max(largest, relative_difference(left[i].tensor, right[i].tensor));
    }
    return largest;
}

/// Every tensor agrees to `tolerance` in relative_difference, and has a gradient on both sides or on none.
inline void expect_agree(const Named& left, const Named& right, double tolerance) {
    ASSERT_EQ(left.size(), right.size());
    for (std::size_t i = 0; i < left.size(); ++i) {
        ASSERT_EQ(left[i].tensor.defined(), right[i].tensor.defined()) << left[i].name;
        if (!left[i].tensor.defined()) continue;
        EXPECT_LE(relative_difference(left[i].tensor, right[i].tensor), tolerance) << left[i].name;
    }
}

inline bool same_bits(const at::Tensor& left, const at::Tensor& right) {
    const at::Tensor a = left.cpu().contiguous();
    const at::Tensor b = right.cpu().contiguous();
    return a.scalar_type() == b.scalar_type() && a.sizes() == b.sizes() &&
           (a.nbytes() == 0 || std::memcmp(a.const_data_ptr(), b.const_data_ptr(), a.nbytes()) == 0);
}

inline void expect_same_bits(const Named& left, const Named& right) {
    ASSERT_EQ(left.size(), right.size());
    for (std::size_t i = 0; i < left.size(); ++i) {
        EXPECT_TRUE(same_bits(left[i].tensor, right[i].tensor)) << left[i].name;
    }
}

inline void expect_no_gradients(const Parameters& parameters) {
    for (const Parameter& p : parameters) EXPECT_FALSE(p.tensor.grad().defined()) << p.name;
}

}  // namespace microbatch::test
