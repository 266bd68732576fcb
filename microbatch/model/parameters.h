#pragma once

#include "microbatch/state/stored_tensor.h"

namespace microbatch {

/// A tensor that training changes, and its name for messages.
using Parameter = NamedTensor;
using Parameters = NamedTensors;

/// The parameters with each tensor once, under its first name: a tied weight has one gradient and one update.
Parameters without_repeats(const Parameters& parameters);

/// The tensors alone.
std::vector<at::Tensor> tensors_of(const Parameters& parameters);

/// The device of the first one; the CPU if there are none.
at::Device device_of(const Parameters& parameters);

/// Every parameter of a torch::nn::Module (or its holder), each tensor once, including frozen ones.
template <class Module>
Parameters parameters_of(const Module& module) {
    Parameters parameters;
    for (const auto& item : module.named_parameters()) parameters.push_back({item.key(), item.value()});
    return without_repeats(parameters);
}

template <class Contained>
requires requires(const Contained& holder) {
    holder->named_parameters();
}
Parameters parameters_of(const Contained& holder) {
    return parameters_of(*holder);
}

}  // namespace microbatch
