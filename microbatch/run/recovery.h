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

/// The parameters and buffers of a trained model, by name.
NamedTensors weights_of(const Accumulator& accumulator);

/// The results of training a job: parameters and buffers in `model/`, the optimizer's state in `optimizer/`. Excludes
/// the position in the data and the generators. The tensors are shared with the job: see StateDict::own(). Of a sharded
/// optimizer, it has this process's part.
StateDict training_snapshot(const Accumulator& accumulator);

/// Of a run's state with a sharded optimizer, what no other rank has: the optimizer's state, also of snapshots.
StateDict own_part(const StateDict& run);

/// Validates a training_snapshot() for this job. Errors: ErrorKind::bad_data.
Commit prepare_snapshot(Accumulator& accumulator, const StateReader& reader);

/// Makes a saved run one that has not been rolled back: its limit on the learning rate is from other settings.
void forget_roll_backs(StateDict& run);

struct RecoveryOptions {
    std::int64_t most = 3;    ///< how often a run is rolled back; the next divergence ends it
    std::int64_t every = 32;  ///< steps between snapshots; the last two are kept
    std::int64_t margin =
        16;  ///< steps: a snapshot that is not this much older than the first refused step may have corrupted weights
    double rate_factor = 0.5;  ///< of the rate at the last calm step: the limit for the rest of the run
    std::int64_t warmup = 10;  ///< steps of linear warmup to that limit
    /// Snapshots that exceed this go to files in the folder.
    std::int64_t memory_bytes = std::numeric_limits<std::int64_t>::max();
    std::filesystem::path folder = {};  ///< empty: no snapshots in files
};

/// Rolls a run back when it diverges: restores parameters, the model's buffers, the optimizer's state and the gate. The
/// position in the data and the generators continue: the data that led to the divergence is skipped, and every step
/// number is used once.
///
/// The learning rate is limited for the rest of the run: a rate that diverged is not used again. Once the schedule
/// falls below the limit, the schedule applies.
///
/// Source:   PaLM, Chowdhery et al. 2022, arXiv:2204.02311, section 5.1 (rolled back about 100 steps, skipped data).
///           Deviation: the rate.
/// State:    bounded: after `most` roll-backs, the next divergence ends the run.
/// Ownership: borrows the accumulator, which must outlive this.
/// Threads:  no two calls at the same time.
class Recovery final : public Stateful {
public:
    /// Errors: ErrorKind::usage unless most, margin, warmup and memory_bytes are at least 0, every is at least 1, and
    ///         rate_factor is above 0 and at most 1.
    Recovery(Accumulator& accumulator, RecoveryOptions options);

    /// Called before the step after `steps` steps: takes a snapshot if one is due and the gate is calm. If no snapshot
    /// can be taken, reports that once; the run continues with the existing ones. If memory runs out, asks the
    /// reclaimers, then moves snapshots to files.
    std::string keep(std::int64_t steps, const SpikeGate& gate, const Reclaimers& reclaimers = {});

    /// Rolls back after a divergence in the last of `steps` steps. Restores the newest snapshot that is old enough, or
    /// else the oldest, and returns the steps at which it was taken. Empty if no step was applied since the first
    /// snapshot, or there is no snapshot.
    /// Errors: whatever reading a snapshot's file throws; nothing has changed then.
    std::optional<std::int64_t> roll_back(std::int64_t steps, SpikeGate& gate);

    /// True if the run may continue after the roll-back.
    bool may_go_on() const { return times_ <= options_.most; }

    /// The number of roll-backs, including the last one.
    std::int64_t times() const { return times_; }

    /// True from a roll-back until a new snapshot is due.
    bool is_recovering(std::int64_t steps) const;

    /// The learning rate of the step after `steps` steps, if the schedule says `scheduled`.
    double limited(double scheduled, std::int64_t steps) const;

    /// Moves snapshots from memory to files, or drops them if there is no folder; later ones go the same way. Returns
    /// false if none is in memory.
    bool reclaim_memory();

    /// True if a snapshot could not be taken: there are no more.
    bool has_failed() const { return failed_; }

    /// Drops all snapshots, because another rank could not take one: the run is not rolled back any more. Returns what to
    /// tell the user.
    std::string give_up();
    bool has_given_up() const { return given_up_; }

    /// The memory of the snapshots now, including dropped ones that a checkpoint is still writing.
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
    std::deque<Point> points_;  // oldest first
    std::vector<std::pair<c10::weak_intrusive_ptr<c10::StorageImpl>, std::int64_t>>
        in_use_;  // and their sizes in bytes
    std::int64_t times_ = 0;
    std::int64_t rolled_back_at_ = 0;
    double calm_rate_ = 0.0;  // at the last calm step
    double rate_limit_ = std::numeric_limits<double>::infinity();
    std::int64_t files_ = 0;  // created so far
    bool failed_ = false;
    bool given_up_ = false;  // on all ranks
    std::string warning_;    // not yet reported
};

}  // namespace microbatch
