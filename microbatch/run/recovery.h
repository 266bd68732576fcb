#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <deque>
#include <filesystem>
#include <functional>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "microbatch/memory/reclaim.h"
#include "microbatch/step/accumulator.h"

namespace microbatch {

/// What a trained model is: its parameters and buffers, by name.
NamedTensors weights_of(const Accumulator& accumulator);

/// What training has made of a job: parameters and buffers in `model/`, the optimizer's state in `optimizer/`. Not the
/// position in the data, nor the generators. Its tensors are the job's own: see StateDict::own().
StateDict training_snapshot(const Accumulator& accumulator);

/// Validates a training_snapshot() of such a job. Errors: ErrorKind::bad_data.
Commit prepare_snapshot(Accumulator& accumulator, const StateReader& reader);

struct RecoveryOptions {
    std::int64_t most = 3;     ///< times that a run is rolled back; the next divergence ends it
    std::int64_t every = 32;   ///< steps from one snapshot to the next; the last two are kept
    std::int64_t margin = 16;  ///< steps: a snapshot less older than the first refused step may be of damaged weights
    double rate_factor = 0.5;  ///< of the last rate at which the run was calm: no rate is larger from then on
    std::int64_t warmup = 10;  ///< steps, linear, until the rate is back at what it may be
    /// Snapshots that take more go to files in the folder instead.
    std::int64_t memory_bytes = std::numeric_limits<std::int64_t>::max();
    std::filesystem::path folder = {};  ///< empty: there are no others
};

/// Rolls a run back when it diverges: parameters, the model's buffers, the optimizer's state and the gate become what
/// they were. The position in the data and the generators go on: what led there is skipped, and every step number is
/// used once.
///
/// The learning rate is limited for the rest of the run: a rate that diverged never comes back. A schedule that falls
/// below the limit is followed.
///
/// Source:   PaLM, Chowdhery et al. 2022, arXiv:2204.02311, section 5.1 (back some 100 steps, other data). Deviation:
///           the rate.
/// State:    bounded: after `most` roll-backs the next ends the run.
/// Ownership: borrows the accumulator, which must outlive this.
/// Threads:  no two calls at the same time.
class Recovery final : public Stateful {
public:
    /// Errors: ErrorKind::usage unless most, margin, warmup and memory_bytes are at least 0, every is at least 1, and
    ///         rate_factor is above 0 and at most 1.
    Recovery(Accumulator& accumulator, RecoveryOptions options);

    /// Before the step after `steps` steps: takes a snapshot where it is time and the gate is calm. Says what went
    /// wrong, once, where no snapshot could be taken; the run goes on with those there are. Where memory runs out the
    /// reclaimers are asked, then snapshots go to files.
    std::string keep(std::int64_t steps, const SpikeGate& gate, const Reclaimers& reclaimers = {});

    /// The run has diverged in the last of `steps` steps. Restores the newest snapshot that is old enough, the oldest
    /// if none is, and returns how many steps had been made then; none if no step was applied since the first snapshot,
    /// or there is no snapshot.
    /// Errors: whatever reading a snapshot's file throws; nothing has changed then.
    std::optional<std::int64_t> roll_back(std::int64_t steps, SpikeGate& gate);

    /// True if the run is to go on after that.
    bool may_go_on() const { return times_ <= options_.most; }

    /// How often the run was rolled back, the last time included.
    std::int64_t times() const { return times_; }

    /// True from a roll-back until so many steps are made that a snapshot of them would be taken.
    bool is_recovering(std::int64_t steps) const;

    /// The learning rate of the step after `steps` steps, where the schedule says `scheduled`.
    double limited(double scheduled, std::int64_t steps) const;

    /// Moves snapshots from memory into files, or drops them where there is no folder; later ones go the same way.
    /// False if there is none in memory.
    bool reclaim_memory();

    /// What the snapshots take of memory now, dropped ones included that a checkpoint still writes.
    std::int64_t memory_bytes() const;

    void save(const StateWriter& writer) const override;
    Commit prepare(const StateReader& reader) override;

private:
    struct Point {
        std::int64_t steps;
        StateDict state;
    };

    std::filesystem::path new_file();
    Point make_point(std::int64_t steps, const SpikeGate& gate);
    void add(Point point);
    void take_over(Point point);
    void fail(const std::string& why);

    Accumulator* accumulator_;
    RecoveryOptions options_;
    std::deque<Point> points_;                                                                // oldest first
    std::vector<std::pair<c10::weak_intrusive_ptr<c10::StorageImpl>, std::int64_t>> in_use_;  // and their bytes
    std::int64_t times_ = 0;
    std::int64_t rolled_back_at_ = 0;
    double calm_rate_ = 0.0;  // of the last step after which the gate was calm
    double rate_limit_ = std::numeric_limits<double>::infinity();
    std::int64_t files_ = 0;  // made so far
    bool failed_ = false;
    std::string warning_;  // not reported yet
};

}  // namespace microbatch
