#include "microbatch/model/parameters.h"

#include <unordered_set>

#include "microbatch/core/error.h"

namespace microbatch {

Parameters without_repeats(const Parameters& parameters) {
    Parameters result;
    std::unordered_set<const void*> seen;
    for (const Parameter& parameter : parameters) {
        require_that(parameter.tensor.defined(), "parameter ", parameter.name, " is an undefined tensor");
        if (seen.insert(parameter.tensor.unsafeGetTensorImpl()).second) result.push_back(parameter);
    }
    return result;
}

std::vector<at::Tensor> tensors_of(const Parameters& parameters) {
    std::vector<at::Tensor> tensors;
    for (const Parameter& parameter : parameters) tensors.push_back(parameter.tensor);
    return tensors;
}

at::Device device_of(const Parameters& parameters) {
    return parameters.empty() ? at::Device(at::kCPU) : parameters.front().tensor.device();
}

}  // namespace microbatch
