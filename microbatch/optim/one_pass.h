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

/// Updates the elements begin <= j < end of tensors of one dtype and layout.
void update_stretch(const AdamWUpdate& how, const at::Tensor& parameter, const at::Tensor& gradient,
                    const at::Tensor& first_moment, const at::Tensor& second_moment, std::int64_t begin,
                    std::int64_t end);

/// The same for SGD; `velocity` is undefined without momentum.
void update_stretch(const SgdUpdate& how, const at::Tensor& parameter, const at::Tensor& gradient,
                    const at::Tensor& velocity, std::int64_t begin, std::int64_t end);

}  // namespace microbatch
