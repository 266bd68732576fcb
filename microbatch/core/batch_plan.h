#pragma once

#include <cstdint>
#include <limits>

#include "microbatch/core/batch_norm.h"
#include "microbatch/core/error.h"

namespace microbatch {

/// A micro-batch size that no batch exceeds: the batch is not split.
inline constexpr std::int64_t whole_batch = std::numeric_limits<std::int64_t>::max();

/// How a batch is run.
struct Plan {
    /// Samples per forward and backward, at least 1.
    std::int64_t micro_batch = whole_batch;
    /// Backward recomputes the activations inside the model's blocks instead of storing them; with exact BatchNorm, more
    /// of the values between the layers than needed.
    bool recompute = false;
    BatchNorm batch_norm = BatchNorm::naive;

    bool operator==(const Plan&) const = default;
};

/// Samples [begin, end) of a batch.
struct Slice {
    std::int64_t begin = 0;
    std::int64_t end = 0;

    std::int64_t size() const { return end - begin; }

    bool operator==(const Slice&) const = default;
};

/// The samples that part `index` of `parts` takes of a batch: consecutive ones, as evenly as possible; none if there are
/// fewer samples than parts, for some. Requires: 0 <= index < parts.
Slice share_of(std::int64_t samples, std::int64_t index, std::int64_t parts);

/// The same in whole grains of `grain` samples, of which the last one of the batch may have fewer.
Slice share_of_grains(std::int64_t samples, std::int64_t grain, std::int64_t index, std::int64_t parts);

/// The model cannot train on so small a micro-batch: BatchNorm with a single value per channel.
struct TooFewSamples : Error {
    using Error::Error;
};

/// The number of samples in a batch's next micro-batch, or in a run's next batch, if `left` samples are left: `most`,
/// or what is left; one less if a single sample would be left over, because BatchNorm may be unable to train on it.
/// Requires: both at least 1.
std::int64_t next_cut(std::int64_t left, std::int64_t most);

/// The number of micro-batches in a batch: all full except possibly the last (100 in 16 is six of 16 and one of 4), or
/// the last two (33 in 16 is 16, 15 and 2). 0 for an empty batch.
/// Errors: ErrorKind::usage if batch is negative or micro_batch below 1.
std::int64_t micro_batch_count(std::int64_t batch, std::int64_t micro_batch);

/// The samples of micro-batch `index`, counted from 0.
/// Errors: ErrorKind::usage as for micro_batch_count, and unless 0 <= index < micro_batch_count(batch, micro_batch).
Slice micro_batch_slice(std::int64_t batch, std::int64_t micro_batch, std::int64_t index);

}  // namespace microbatch
