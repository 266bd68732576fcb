#pragma once

#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "microbatch/core/units.h"
#include "microbatch/io/checkpoint_store.h"

namespace microbatch {

/// When a run writes checkpoints, and how many stay.
struct RunCheckpointOptions {
    bool enabled = true;
    Interval every{100, Unit::steps};  ///< 0: when the run is interrupted, and at its end
    CheckpointOptions store = {};      ///< sync_first is set by the run
};

/// The checkpoints of a run, in its folder's checkpoints/.
class RunCheckpoints {
public:
    RunCheckpoints(const std::filesystem::path& run, RunCheckpointOptions options);

    /// Goes on from a state that was read: see CheckpointStore::go_on_from(). Newer checkpoints are removed.
    void go_on_from(const StateDict& state, const std::vector<std::filesystem::path>& damaged);

    /// After a step: begins to write where it is time. True if it did. `state` is called only then.
    bool after_step(const Progress& progress, const std::function<StateDict()>& state);

    /// Writes at once, whether it is time or not. True if it, or one of the same point, is on the disk.
    bool save_now(const Progress& progress, const std::function<StateDict()>& state);

    /// What went wrong since the last call.
    std::vector<std::string> warnings();

    /// See CheckpointStore.
    std::int64_t memory_bytes() const { return store_ ? store_->memory_bytes() : 0; }
    bool release() { return store_ && store_->release(); }

    std::optional<std::int64_t> newest_healthy() const { return store_ ? store_->newest_healthy() : std::nullopt; }

    /// How many are written so far, of those that are finished.
    std::int64_t written() const { return store_ ? store_->written() : 0; }

private:
    std::optional<StateDict> state_of(const Progress& progress, const std::function<StateDict()>& state);

    std::unique_ptr<CheckpointStore> store_;  // null: none are written
    Interval every_;
    std::int64_t times_ = 0;  // that `every_` has gone by, at the last one
    bool due_ = false;
    std::vector<std::string> warnings_;  // beside the store's
};

}  // namespace microbatch
