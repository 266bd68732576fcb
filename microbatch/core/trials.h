#pragma once

#include <cstdint>
#include <limits>
#include <map>
#include <optional>
#include <vector>

#include "microbatch/core/memory_model.h"

namespace microbatch {

/// Memory and time of one micro-batch size, measured without any optimizer state that did not exist before.
struct MicroBatchTrial {
    MemoryProfile first;         ///< of a batch's first micro-batch, which creates the gradients
    MemoryProfile later = {};    ///< of a later one; empty if the batch is not split
    double seconds = 0.0;        ///< one warm micro-batch, forward and backward
    double spent_seconds = 0.0;  ///< of the whole trial
};

/// Peak bytes of the first and of the later micro-batches of a batch.
struct MicroBatchPeaks {
    std::int64_t first = 0;
    std::int64_t later = 0;  ///< 0 if the batch is not split
};

/// The trials of some micro-batch sizes, and what they predict for others.
class Trials {
public:
    explicit Trials(std::int64_t batch) : batch_(batch) {}

    void add(std::int64_t size, MicroBatchTrial trial);

    /// Adds another time for a size that was tried. From the second on, their median replaces the trial's own time,
    /// which was measured at another moment.
    void add_time(std::int64_t size, double seconds);

    /// Records that neither this size nor any larger one below the batch fits.
    void add_failure(std::int64_t size);

    bool empty() const { return trials_.empty(); }
    bool contains(std::int64_t size) const { return trials_.contains(size); }
    bool failed(std::int64_t size) const;
    bool any_cut_failed() const { return smallest_failure_ < batch_; }
    std::int64_t largest() const {
        return trials_.rbegin()->first;
    }  ///< of the sizes that were tried; requires !empty()
    const std::map<std::int64_t, MicroBatchTrial>& all() const { return trials_; }

    /// As measured; for a size that was not tried, predicted from the largest two trials that allocated in the same
    /// order (or else the largest two). nullopt if there are too few.
    std::optional<MicroBatchPeaks> peaks(std::int64_t size) const;

    /// The time of one micro-batch: as measured, interpolated between the neighbouring trials, or extrapolated from the
    /// last two; proportional to a single trial. 0 without a trial.
    double seconds(std::int64_t size) const;

    /// A lower bound of seconds(), assuming a fixed time per micro-batch and a time per sample that never falls: on the
    /// line through the two trials below. seconds() where there are no two.
    double least_seconds(std::int64_t size) const;

    /// False if no two trials allocated in the same order, so that only peaks could be compared.
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
