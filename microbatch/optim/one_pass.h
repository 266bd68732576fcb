#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <vector>

namespace microbatch {

/// The updates that AdamW and Sgd make of tensors on the CPU, each in one pass over memory. A gradient is divided where
/// it is read, and never written: 28 bytes a parameter for AdamW in float.
///
/// Bits: those of a gradient that was divided before; the same for every number of threads.

/// True for what update_stretch() takes: float or double on the CPU.
bool updates_in_one_pass(const at::Tensor& parameter);

/// Calls work(i, begin, end) for stretches begin <= j < end of the i-th tensor that make up all of them, on torch's
/// threads: one parallel region for all the tensors.
void for_each_stretch(const std::vector<at::Tensor>& tensors,
                      const std::function<void(std::size_t, std::int64_t, std::int64_t)>& work);

struct AdamWUpdate {
    double beta1, beta2, epsilon;
    double kept;        ///< of the parameter: 1 - eta lambda
    double length;      ///< of the step: eta / (1 - b1^t)
    double correction;  ///< of the root: 1 / sqrt(1 - b2^t)
    double divisor;
};

struct SgdUpdate {
    double learning_rate, momentum;
    bool nesterov;
    double kept;   ///< of the parameter, with decoupled decay: 1 - eta lambda
    double decay;  ///< a coupled one's share of the parameter, which is added to the gradient
    double divisor;
};

/// Updates the elements begin <= j < end of tensors of one dtype and layout.
void update_stretch(const AdamWUpdate& how, const at::Tensor& parameter, const at::Tensor& gradient,
                    const at::Tensor& first_moment, const at::Tensor& second_moment, std::int64_t begin,
                    std::int64_t end);

/// The same for SGD; `velocity` is undefined without momentum.
void update_stretch(const SgdUpdate& how, const at::Tensor& parameter, const at::Tensor& gradient,
                    const at::Tensor& velocity, std::int64_t begin, std::int64_t end);

}  // namespace microbatch
