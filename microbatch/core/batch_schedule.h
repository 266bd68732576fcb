#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "microbatch/core/schedule.h"
#include "microbatch/core/units.h"

namespace microbatch {

/// A batch size, and the point from which it applies.
struct BatchStage {
    std::int64_t batch = 1;
    Interval from{};  ///< counted from the start of the run

    bool operator==(const BatchStage&) const = default;
};

/// A batch that changes during a run: the stages in order, the first one from 0.
using BatchSchedule = std::vector<BatchStage>;

/// A schedule as people write it: "32 at 0, 128 at 2M tokens".
/// Errors: ErrorKind::usage if a stage is not "N at INTERVAL", or as validate().
BatchSchedule parse_batch_schedule(std::string_view input);

/// "32 at 0 steps, 128 at 2000000 tokens": parse_batch_schedule reads the same schedule back.
std::string to_string(const BatchSchedule& schedule);

/// Errors: ErrorKind::usage unless there is a stage, the first is at 0, each begins after the one before, all that are
/// not at 0 share a unit, and every batch is at least 1.
void validate(const BatchSchedule& schedule);

/// The batch of a step that begins at `progress`. Requires: a valid schedule.
std::int64_t batch_at(const BatchSchedule& schedule, const Progress& progress);

/// Of all stages.
std::int64_t smallest_batch(const BatchSchedule& schedule);
std::int64_t largest_batch(const BatchSchedule& schedule);

/// The batch doubles each time the learning rate's schedule has halved since its warmup, up to `most` samples. The rate
/// is the schedule's rate times the rule's factor for the batch: where it would have halved, it is multiplied by 0.71
/// with `sqrt` and does not change with `linear`.
///
/// Errors: ErrorKind::usage if `batch` is below 1, `most` below it, the schedule does not fall or is not valid, or its
///         length is in steps, which would be more samples the larger the batch.
/// Source: Seesaw 2025 (cut by a: the rate by sqrt(a), the batch by 1/a), with a = 1/2; with `linear`: Smith et al.
///         2018, arXiv:1711.00489.
BatchSchedule seesaw(const Schedule& schedule, std::int64_t batch, std::int64_t most);

}  // namespace microbatch
