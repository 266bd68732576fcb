#include "microbatch/core/batch_plan.h"

#include <algorithm>

#include "microbatch/core/str_cat.h"

namespace microbatch {

std::int64_t next_cut(std::int64_t left, std::int64_t most) {
    // With two per micro-batch, this would only move the single sample.
    const bool would_leave_one = most > 2 && left - 1 == most;
    return would_leave_one ? most - 1 : std::min(left, most);
}

std::int64_t micro_batch_count(std::int64_t batch, std::int64_t micro_batch) {
    if (batch < 0) throw Error(ErrorKind::usage, str_cat("the batch is ", batch, " samples; it must be 0 or more"));
    if (micro_batch < 1) {
        throw Error(ErrorKind::usage, str_cat("the micro-batch is ", micro_batch, " samples; it must be 1 or more"));
    }
    return batch / micro_batch + (batch % micro_batch == 0 ? 0 : 1);
}

Slice micro_batch_slice(std::int64_t batch, std::int64_t micro_batch, std::int64_t index) {
    const std::int64_t count = micro_batch_count(batch, micro_batch);
    if (index < 0 || index >= count) {
        throw Error(ErrorKind::usage, str_cat("micro-batch ", index, " of a batch that has ", count, " (", batch,
                                              " samples in ", micro_batch, "); count from 0"));
    }
    std::int64_t begin = index * micro_batch;
    if (index > 0) begin -= micro_batch - next_cut(batch - begin + micro_batch, micro_batch);
    return {begin, begin + next_cut(batch - begin, micro_batch)};
}

}  // namespace microbatch
