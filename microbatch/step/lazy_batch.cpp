#include "microbatch/step/lazy_batch.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"

namespace microbatch {
namespace {

std::vector<std::int64_t> longest(const Dataset& dataset, std::int64_t samples) {
    if (samples < 1) throw Error(ErrorKind::usage, str_cat("a batch of ", samples, " samples; give at least 1"));
    return std::vector<std::int64_t>(static_cast<std::size_t>(samples), dataset.longest_sample());
}

}  // namespace

Batch lazy_batch(std::span<const std::int64_t> indices) {
    const at::Tensor field = at::empty({static_cast<std::int64_t>(indices.size())}, at::kLong);
    std::copy(indices.begin(), indices.end(), field.mutable_data_ptr<std::int64_t>());
    return {{field}};
}

LossFunction loss_on(const Dataset& dataset, LossFunction loss) {
    return [&dataset, loss = std::move(loss)](const Batch& micro) {
        const at::Tensor& field = micro.fields.at(0);
        const std::span<const std::int64_t> indices(field.const_data_ptr<std::int64_t>(),
                                                    static_cast<std::size_t>(field.numel()));
        return loss(dataset.get(indices));
    };
}

Batch longest_lazy_batch(const Dataset& dataset, std::int64_t samples) {
    return lazy_batch(longest(dataset, samples));
}

Batch longest_batch(const Dataset& dataset, std::int64_t samples) {
    return dataset.get(longest(dataset, samples));
}

}  // namespace microbatch
