#include "microbatch/distributed/shards.h"

#include <algorithm>

namespace microbatch {

void Shards::add(const Parameters& parameters) {
    for (const bool trained : {true, false}) {
        for (const Parameter& parameter : parameters) {
            if (parameter.tensor.requires_grad() == trained) add(parameter.tensor);
        }
    }
}

void Shards::add(const at::Tensor& parameter) {
    const auto least = std::ranges::min_element(bytes_);
    const auto [place, is_new] =
        ranks_.emplace(parameter.unsafeGetTensorImpl(), static_cast<int>(least - bytes_.begin()));
    if (is_new) *least += static_cast<std::int64_t>(parameter.nbytes());
}

}  // namespace microbatch
