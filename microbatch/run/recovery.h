#pragma once

#include <cstdint>
#include <deque>
#include <filesystem>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "microbatch/core/spike_guard.h"
#include "microbatch/run/run_point.h"
#include "microbatch/run/trainer_state.h"

namespace microbatch {

struct RecoveryOptions {
    std::int64_t most = 3;     ///< times that a run goes back; the next divergence ends it
    std::int64_t every = 32;   ///< steps from one snapshot to the next; the last two are kept
    std::int64_t margin = 16;  ///< steps: a snapshot less older than the first refused step may be of damaged weights
    double cut = 0.5;          ///< what remains of the learning rate
    std::int64_t warmup = 10;  ///< steps, linear, until that is reached
    std::int64_t mend = 40;    ///< steps more, linear, until the rate is what it was before it was cut this time
    /// Snapshots that take more go to files in the folder instead.
    std::int64_t memory_bytes = std::numeric_limits<std::int64_t>::max();
    std::filesystem::path folder = {};  ///< none: there are no others
};

/// What a run goes back to when it diverges: parameters, the model's buffers, the optimizer's state and the guard, as
/// they were before. The position in the data and the generators go on: what led there is left out, and every step
/// number is used once.
///
/// The rate is cut, warmed up to that, and given back. A run that diverges again keeps the cut of the time before: once
/// it may have been a spike, twice it is the rate.
///
/// Source:   PaLM, Chowdhery et al. 2022, arXiv:2204.02311, section 5.1 (back some 100 steps, other data). Deviation:
///           the rate.
/// State:    bounded: after `most` times going back is the end of the run.
/// Ownership: borrows the accumulator, which must outlive this.
/// Threads:  no two calls at the same time.
class Recovery {
public:
    /// Errors: ErrorKind::usage unless most, margin, warmup, mend and memory_bytes are at least 0, every is at least 1,
    ///         and cut is above 0 and at most 1.
    Recovery(Accumulator& accumulator, RecoveryOptions options);

    /// Before the step after `steps` steps: takes a snapshot where it is time and the guard is calm. Says what went
    /// wrong, once, where no snapshot could be taken; the run goes on with those there are. `release_memory` is asked
    /// where there is no memory for one: see StepOptions.
    std::string keep(std::int64_t steps, const SpikeGuard& guard, const std::function<bool()>& release_memory = {});

    /// The run has diverged in the last of `steps` steps. Puts all back to the newest snapshot that is old enough, the
    /// oldest if none is, and returns how many steps had been made then; none if no step was applied since the first
    /// one, or there is none.
    /// Errors: as RunPoint::put_back(); nothing has changed then.
    std::optional<std::int64_t> go_back(std::int64_t steps, SpikeGuard& guard);

    /// True if the run is to go on after that.
    bool may_go_on() const { return times_ <= options_.most; }

    /// How often the run went back, the last time included.
    std::int64_t times() const { return times_; }

    /// What the learning rate of the step after `steps` steps is multiplied by.
    double rate_factor(std::int64_t steps) const;

    /// Moves snapshots from memory into files, or drops them where there is no folder; later ones go the same way.
    /// False if there is none in memory.
    bool give_up_memory();

    /// What the snapshots take of memory now, those included that are left out but that somebody still writes down.
    std::int64_t memory_bytes() const;

    /// What it would go back to, with its snapshots' own tensors. `names` are those of the snapshots' tensors, where
    /// they are as many; the others are numbered.
    RecoveryState state(const std::vector<std::string>& names) const;

    /// Goes on from a state that a run of such an accumulator had: snapshots in memory or in files by the options.
    /// Where a file cannot be written it is as in keep(): there are those that could be, and no more are taken.
    /// Errors: ErrorKind::usage if a count is below 0 or a guard's state is none, and what getting a tensor throws;
    ///         nothing has changed then.
    void restore(const RecoveryState& state);

private:
    struct Point {
        std::int64_t steps;
        SpikeGuardState guard;
        RunPoint run;
    };

    std::filesystem::path new_file();
    void take(std::int64_t steps, const SpikeGuard& guard, const std::function<bool()>& release_memory);
    void add(Point point);
    Snapshot make_snapshot(const StoredTensors& tensors, bool in_files);
    void fail(const std::string& why);

    Accumulator* accumulator_;
    RecoveryOptions options_;
    std::deque<Point> points_;                           // oldest first
    std::vector<std::weak_ptr<const Snapshot>> in_use_;  // theirs, and those that are left out and lent
    std::int64_t times_ = 0;
    std::int64_t gone_back_at_ = 0;
    std::int64_t files_ = 0;  // made so far
    bool failed_ = false;
    std::string warning_;  // not said yet
};

}  // namespace microbatch
