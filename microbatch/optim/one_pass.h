#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "microbatch/ops/kernels/kernels.h"

namespace microbatch {

/// The updates of AdamW and Sgd for tensors on the CPU, each in one pass over memory. A gradient is divided as it is
/// read, and never written: 28 bytes per parameter for AdamW in float.
///
/// Bits: as if the gradient had been divided first; the same for every number of threads and vector width.

/// True if update_stretch() supports the parameter: float or double on the CPU.
bool updates_in_one_pass(const at::Tensor& parameter);

/// Calls work(i, begin, end) for stretches begin <= j < end of the i-th tensor that together cover all tensors, on
/// torch's threads: a single parallel region for all of them.
void for_each_stretch(const std::vector<at::Tensor>& tensors,
                      const std::function<void(std::size_t, std::int64_t, std::int64_t)>& work);

/// Updates the elements begin <= j < end of tensors of one dtype and layout by that dtype's kernel. `first` and
/// `second` are the optimizer's state, undefined where it keeps none.
template <class How>
void update_stretch(const How& how, void (*kernel)(const How&, const UpdateArrays<float>&),
                    void (*kernel_double)(const How&, const UpdateArrays<double>&), const at::Tensor& parameter,
                    const at::Tensor& gradient, const at::Tensor& first, const at::Tensor& second, std::int64_t begin,
                    std::int64_t end) {
    const auto call = [&]<class Number>(void (*one)(const How&, const UpdateArrays<Number>&)) {
        const auto from = [begin](const at::Tensor& tensor) {
            return tensor.defined() ? tensor.mutable_data_ptr<Number>() + begin : nullptr;
        };
        one(how, {from(parameter), gradient.const_data_ptr<Number>() + begin, from(first), from(second), end - begin});
    };
    parameter.scalar_type() == at::kFloat ? call(kernel) : call(kernel_double);
}

}  // namespace microbatch
