#pragma once

#include <cstdint>
#include <limits>
#include <map>
#include <optional>
#include <vector>

#include "microbatch/core/memory_model.h"

namespace microbatch {

/// What one micro-batch size took when it was tried, with no optimizer state that was not there before.
struct MicroBatchTrial {
    MemoryProfile first;         ///< of a batch's first micro-batch, which finds no gradients
    MemoryProfile later = {};    ///< of a later one, which does; empty if the batch is not cut
    double seconds = 0.0;        ///< one warm micro-batch, forward and backward
    double spent_seconds = 0.0;  ///< all that the trial took
};

/// Peak bytes of the first and of the later micro-batches of a batch.
struct MicroBatchPeaks {
    std::int64_t first = 0;
    std::int64_t later = 0;  ///< 0 if the batch is not cut
};

/// The trials of some micro-batch sizes, and what they say of the others.
class Trials {
public:
    explicit Trials(std::int64_t batch) : batch_(batch) {}

    void add(std::int64_t size, MicroBatchTrial trial);

    /// A size that was tried was timed once more. From the second such time on theirs is the median, and the trial's
    /// own time, which is of another moment, is forgotten.
    void add_time(std::int64_t size, double seconds);

    /// The size, and with it every larger one of a cut batch, is known not to fit.
    void add_failure(std::int64_t size);

    bool empty() const { return trials_.empty(); }
    bool contains(std::int64_t size) const { return trials_.contains(size); }
    bool failed(std::int64_t size) const;
    bool any_cut_failed() const { return smallest_failure_ < batch_; }
    std::int64_t largest() const { return trials_.rbegin()->first; }  ///< that was tried; not if empty()
    const std::map<std::int64_t, MicroBatchTrial>& all() const { return trials_; }

    /// As measured, or what the largest two trials say that allocated in the same way (or else the largest two) of a
    /// size that was not tried; none where there are too few.
    std::optional<MicroBatchPeaks> peaks(std::int64_t size) const;

    /// Of one micro-batch: as measured, or on the line through the trials beside it, beyond them on that through the
    /// last two; of a single trial its share. 0 where there is none.
    double seconds(std::int64_t size) const;

    /// The least that it can be where time per micro-batch is a fixed part and one per sample that does not fall: on
    /// the line through the two trials before it. As seconds() where there are no two.
    double least_seconds(std::int64_t size) const;

    /// False if no two trials allocated in the same way, so that only peaks could be compared.
    bool matched() const;

private:
    using Trial = std::map<std::int64_t, MicroBatchTrial>::const_iterator;

    std::optional<MemoryModel> fit(MemoryProfile MicroBatchTrial::*phase) const;
    static double on_line(Trial left, Trial right, std::int64_t size);

    std::int64_t batch_;
    std::map<std::int64_t, MicroBatchTrial> trials_;          // by micro-batch
    std::map<std::int64_t, std::vector<double>> more_times_;  // by micro-batch
    std::optional<MemoryModel> first_;
    std::optional<MemoryModel> later_;
    std::int64_t smallest_failure_ = std::numeric_limits<std::int64_t>::max();
    bool uncut_failed_ = false;
};

}  // namespace microbatch
