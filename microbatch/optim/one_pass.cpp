#include "microbatch/optim/one_pass.h"

#include <algorithm>

#include "microbatch/runtime/parallel.h"

namespace microbatch {

bool updates_in_one_pass(const at::Tensor& parameter) {
    return parameter.is_cpu() && (parameter.scalar_type() == at::kFloat || parameter.scalar_type() == at::kDouble);
}

void for_each_stretch(const std::vector<at::Tensor>& tensors,
                      const std::function<void(std::size_t, std::int64_t, std::int64_t)>& work) {
    std::int64_t all = 0;
    for (const at::Tensor& tensor : tensors) all += tensor.numel();
    constexpr std::int64_t grain = 32768;  // torch's own for elements: below it a second thread gains nothing
    in_parallel(all, grain, [&](std::int64_t begin, std::int64_t end) {
        std::int64_t first = 0;  // element of the i-th tensor
        for (std::size_t i = 0; i < tensors.size() && first < end; ++i) {
            const std::int64_t count = tensors[i].numel();
            const std::int64_t from = std::max(begin - first, std::int64_t{0}), to = std::min(end - first, count);
            if (from < to) work(i, from, to);
            first += count;
        }
    });
}

}  // namespace microbatch
