#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "microbatch/io/checkpoint_store.h"
#include "cli/commands/resume.h"

namespace microbatch::cli {

/// When a run writes checkpoints, and what into them.
class RunCheckpoints {
public:
    /// Its log is to be on the disk before a checkpoint is.
    RunCheckpoints(const std::filesystem::path& run, const Settings& settings, std::int64_t memory_bytes,
                   RunNotes notes);

    /// Goes on from a point that was read: see CheckpointStore::go_on_from().
    void go_on_from(const TrainerState& state, const std::vector<std::filesystem::path>& damaged);

    /// After a step: begins to write where it is time. True if it did.
    bool after_step(const Trainer& trainer, const Outcome& outcome);

    /// Writes at once, whether it is time or not. True if it, or one of the same point, is on the disk.
    bool save_now(const Trainer& trainer, const Outcome& outcome);

    /// What went wrong since the last call.
    std::vector<std::string> warnings();

    /// See CheckpointStore.
    std::int64_t memory_bytes() const { return store_ ? store_->memory_bytes() : 0; }
    bool release() { return store_ && store_->release(); }

    /// How many are written so far, of those that are finished.
    std::int64_t written() const { return store_ ? store_->written() : 0; }

private:
    std::optional<Checkpoint> checkpoint_of(const Trainer& trainer, const Outcome& outcome);

    std::unique_ptr<CheckpointStore> store_;  // null: none are written
    Interval every_;
    std::int64_t times_ = 0;  // that `every_` has gone by, at the last one
    bool due_ = false;
    RunNotes notes_;
    std::vector<std::string> warnings_;  // beside the store's
};

/// "every 100 steps, the newest 3 stay".
std::string describe_checkpoints(const Settings& settings);

/// Throws ErrorKind::usage for flags of checkpoints that cannot be read or contradict each other.
void validate_checkpoints(const Settings& settings);

}  // namespace microbatch::cli
