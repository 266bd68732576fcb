#include "microbatch/distributed/shards.h"

#include <algorithm>
#include <utility>

namespace microbatch {

void Shards::add(std::vector<at::Tensor> parameters) {
    const auto order = [](const at::Tensor& one) { return std::pair(one.requires_grad(), one.nbytes()); };
    std::ranges::stable_sort(parameters, std::ranges::greater(), order);
    for (const at::Tensor& one : parameters) {
        const auto least = std::ranges::min_element(bytes_);
        const auto rank = static_cast<int>(least - bytes_.begin());
        if (ranks_.emplace(one.unsafeGetTensorImpl(), rank).second) *least += static_cast<std::int64_t>(one.nbytes());
    }
}

}  // namespace microbatch
