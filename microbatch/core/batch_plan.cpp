#include "microbatch/core/batch_plan.h"

#include <algorithm>

#include "microbatch/core/str_cat.h"

namespace microbatch {

Slice share_of(std::int64_t samples, std::int64_t index, std::int64_t parts) {
    // Without the product samples * index, which may exceed 64 bits.
    const auto begin = [&](std::int64_t i) { return samples / parts * i + samples % parts * i / parts; };
    return {begin(index), begin(index + 1)};
}

Slice share_of_grains(std::int64_t samples, std::int64_t grain, std::int64_t index, std::int64_t parts) {
    const Slice grains = share_of(micro_batch_count(samples, grain), index, parts);
    return {std::min(grains.begin * grain, samples), std::min(grains.end * grain, samples)};
}

std::int64_t next_cut(std::int64_t left, std::int64_t most) {
    // With two per micro-batch, this would only move the single sample.
    const bool would_leave_one = most > 2 && left - 1 == most;
    return would_leave_one ? most - 1 : std::min(left, most);
}

std::int64_t micro_batch_count(std::int64_t batch, std::int64_t micro_batch) {
    require_that(batch >= 0, "the batch is ", batch, " samples; it must be 0 or more");
    require_that(micro_batch >= 1, "the micro-batch is ", micro_batch, " samples; it must be 1 or more");
    return batch / micro_batch + (batch % micro_batch == 0 ? 0 : 1);
}

Slice micro_batch_slice(std::int64_t batch, std::int64_t micro_batch, std::int64_t index) {
    const std::int64_t count = micro_batch_count(batch, micro_batch);
    require_that(index >= 0 && index < count, "micro-batch ", index, " of a batch that has ", count, " (", batch,
                 " samples in ", micro_batch, "); count from 0");
    std::int64_t begin = index * micro_batch;
    if (index > 0) begin -= micro_batch - next_cut(batch - begin + micro_batch, micro_batch);
    return {begin, begin + next_cut(batch - begin, micro_batch)};
}

}  // namespace microbatch
