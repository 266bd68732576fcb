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

/// When a run writes checkpoints, and how many are kept.
struct RunCheckpointOptions {
    bool enabled = true;
    Interval every{100, Unit::steps};  ///< 0: only on interrupt and at the end
    CheckpointOptions store = {};      ///< sync_first is set by the run
};

/// The checkpoints of a run, in its folder's checkpoints/.
class RunCheckpoints {
public:
    RunCheckpoints(const std::filesystem::path& run, RunCheckpointOptions options);

    /// Resumes from this state: see CheckpointStore::go_on_from(). Newer checkpoints are deleted.
    void go_on_from(const StateDict& state, const std::vector<std::filesystem::path>& damaged);

    /// Called after a step: starts writing if a checkpoint is due. Returns true if it did. `state` is called only then.
    bool after_step(const Progress& progress, const std::function<StateDict()>& state);

    /// Writes immediately, whether due or not. Returns true if it, or one of the same progress, is on the disk.
    bool save_now(const Progress& progress, const std::function<StateDict()>& state);

    /// The failures since the last call.
    std::vector<std::string> warnings();

    /// See CheckpointStore.
    std::int64_t memory_bytes() const { return store_ ? store_->memory_bytes() : 0; }
    bool release() { return store_ && store_->release(); }

    std::optional<std::int64_t> newest_healthy() const { return store_ ? store_->newest_healthy() : std::nullopt; }

    /// The number of checkpoints written so far.
    std::int64_t written() const { return store_ ? store_->written() : 0; }

private:
    std::optional<StateDict> state_of(const Progress& progress, const std::function<StateDict()>& state);

    std::unique_ptr<CheckpointStore> store_;  // null: checkpoints are off
    Interval every_;
    std::int64_t times_ = 0;  // how many times `every_` had passed at the last one
    bool due_ = false;
    std::vector<std::string> warnings_;  // in addition to the store's
};

}  // namespace microbatch
