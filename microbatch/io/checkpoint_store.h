#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <future>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "microbatch/core/units.h"
#include "microbatch/io/checkpoint.h"

namespace microbatch {

struct CheckpointOptions {
    std::int64_t keep = 3;                    ///< how many of the newest to keep; the newest healthy one is always kept
    std::optional<Interval> keep_every = {};  ///< also keep the first at or after each multiple of this
    /// The most memory that the copy for the background thread may take. A larger checkpoint is written in the
    /// foreground while training waits.
    std::int64_t memory_bytes = std::numeric_limits<std::int64_t>::max();
    std::vector<std::filesystem::path> sync_first =
        {};  ///< called before each checkpoint to sync the log and its folder
    /// The other processes that write parts: every checkpoint is written in the foreground then. Borrowed.
    CheckpointParts* parts = nullptr;
};

/// The checkpoints of a run, each in its own folder: step-00000100, or step-00000100-24 if it includes 24 samples of
/// the next batch. A checkpoint is written next to its final place, synced to the disk and then renamed, so it is
/// either complete or absent. Then the checkpoints that are no longer to be kept are deleted.
///
///     CheckpointStore store(run / "checkpoints");
///     if (const auto newest = store.newest()) load(trainer, StateReader(*newest));
///     while (!trainer.done()) {
///         trainer.step();
///         if (is_time && !store.is_busy()) store.save(state_of(trainer));
///         for (const std::string& warning : store.warnings()) ...
///     }
///
/// Faults:  any failure to write a checkpoint is a warning: earlier ones stay untouched, and the next save() tries
///          again. On a full disk, the oldest is deleted to make room for the new one.
/// Threads: no two calls at the same time; uses a thread of its own while it writes.
class CheckpointStore {
public:
    /// Errors: ErrorKind::usage unless keep >= 1, keep_every is above 0 and memory_bytes at least 0. The folder is
    ///         created with the first checkpoint. Half-written or half-deleted checkpoints of a killed run are deleted.
    explicit CheckpointStore(std::filesystem::path folder, CheckpointOptions options = {},
                             FileSystem& files = system_files());
    CheckpointStore(const CheckpointStore&) = delete;
    CheckpointStore& operator=(const CheckpointStore&) = delete;
    /// Waits for the current write.
    ~CheckpointStore();

    /// The newest valid checkpoint; with `healthy`, the newest valid one that is healthy. warnings() names newer ones
    /// that are corrupted.
    /// Errors: ErrorKind::bad_data, naming each, if there are checkpoints but none is valid, or if the folder cannot be
    ///         read; AnotherVersion if the newest valid one has a different format version.
    std::optional<StateDict> newest(bool healthy = false);

    /// Tells the store that the run resumes from `state`: the next save() of this progress writes nothing, because its
    /// checkpoint exists. `damaged` are the corrupted checkpoints that newest() of another store skipped.
    void go_on_from(const StateDict& state, const std::vector<std::filesystem::path>& damaged = {});

    /// Deletes checkpoints newer than the resumed one, except corrupted ones: their steps run again.
    /// Errors: ErrorKind::bad_data if the folder cannot be read; as FileSystem.
    void abandon_newer() const;

    /// The steps of the newest checkpoint whose manifest says that it is healthy; nothing else is read. Empty if no
    /// checkpoint is healthy.
    std::optional<std::int64_t> newest_healthy() const;

    /// The checkpoints that newest() skipped as corrupted, without those that have been written again.
    const std::vector<std::filesystem::path>& damaged() const { return damaged_; }

    /// Copies the tensors that the next step changes, and writes from the copy in a thread. If the copy does not fit, a
    /// snapshot is in a file (which is read during writing), other processes write parts or a thread cannot be started,
    /// acts as save_now().
    /// Requires: not is_busy(); otherwise it waits.
    void save(StateDict state);

    /// Writes in the foreground. Returns true if it, or an earlier one of the same progress, is on the disk.
    bool save_now(const StateDict& state);

    /// True while the thread is writing.
    bool is_busy() const;

    /// The failures since the last call of writes that have finished; also frees their copies.
    std::vector<std::string> warnings();

    /// The number of checkpoints written so far.
    std::int64_t written() const { return written_; }

    /// Waits for the thread and frees its copy. Returns true if there was one.
    bool release();

    /// The memory of the copy, which lives until warnings() or release() is called after the write.
    std::int64_t memory_bytes() const;

    const std::filesystem::path& folder() const { return folder_; }

private:
    struct Place;
    struct Writing;

    std::vector<Place> places() const;
    void remove_leftovers();
    bool is_damaged(const Place& place) const;
    bool is_saved(const CheckpointManifest& what) const;
    bool is_kept(const Progress& progress) const;
    std::string write(const StateDict& state) const;
    std::string write_once(const StateDict& state) const;
    bool remove_oldest() const;
    void remove_old(const Place& newest) const;
    void remove(const std::filesystem::path& checkpoint) const;
    void start(StateDict state);
    bool conclude(const CheckpointManifest& what, const std::function<std::string()>& write);

    std::filesystem::path folder_;
    CheckpointOptions options_;
    FileSystem& files_;
    std::unique_ptr<Writing> writing_;
    std::optional<Progress> saved_;   // of the last one that was written or read
    std::int64_t saved_samples_ = 0;  // of the partial batch after it
    std::int64_t written_ = 0;
    std::vector<std::filesystem::path> damaged_;
    std::vector<std::string> warnings_;
};

}  // namespace microbatch
