#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <utility>
#include <vector>

#include "microbatch/state/snapshot.h"
#include "microbatch/step/accumulator.h"

namespace microbatch {

/// What training has made of a job, to go back to: parameters, the model's buffers and the optimizer's state. Not where
/// in the data it was, nor the generators.
///
/// Threads: as Accumulator's.
class RunPoint {
public:
    /// A copy of what is there now: in memory where it takes at most `memory_bytes`, otherwise in a new `file`.
    /// Throws c10::OutOfMemoryError if there is no room.
    /// Errors: ErrorKind::usage if it is to be a file and that is empty, or as Snapshot.
    RunPoint(const Accumulator& accumulator, std::int64_t memory_bytes, const std::filesystem::path& file);

    /// One that was made before: parameters, buffers, then the state of one parameter of the optimizer after the other,
    /// of which `state_counts` says how many tensors it has.
    RunPoint(Snapshot snapshot, std::vector<std::size_t> state_counts)
        : snapshot_(std::make_shared<const Snapshot>(std::move(snapshot))), state_counts_(std::move(state_counts)) {}

    /// Lent to whoever still reads it when this is gone.
    const std::shared_ptr<const Snapshot>& snapshot() const { return snapshot_; }
    const std::vector<std::size_t>& state_counts() const { return state_counts_; }

    /// Makes the job again what it was; it must be the same, or made alike.
    /// Errors: as Snapshot::tensors() and Optimizer::restore(); nothing has changed then.
    void put_back(Accumulator& accumulator) const;

    /// From memory into a new file. Errors: as Snapshot; ErrorKind::usage if `file` is empty. It stays in memory then.
    void move_to(const std::filesystem::path& file);

    std::int64_t memory_bytes() const { return snapshot_->memory_bytes(); }

private:
    struct Live;

    RunPoint(const Live& live, std::int64_t memory_bytes, const std::filesystem::path& file);

    std::shared_ptr<const Snapshot> snapshot_;  // parameters, buffers, then the state of one parameter after the other
    std::vector<std::size_t> state_counts_;     // of each parameter of the optimizer
};

}  // namespace microbatch
