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
    std::int64_t keep = 3;                    ///< so many of the newest stay, and the newest healthy one
    std::optional<Interval> keep_every = {};  ///< and the first at or after each multiple of this
    /// What the copy may take of memory that a thread writes from; a checkpoint that takes more is written at once,
    /// while the training waits.
    std::int64_t memory_bytes = std::numeric_limits<std::int64_t>::max();
    std::vector<std::filesystem::path> sync_first =
        {};  ///< what is to be on the disk before it: the run's log, and its folder
};

/// The checkpoints of a run: a folder with a folder for each, step-00000100, or step-00000100-24 where 24 samples of
/// the next batch were in already. Each is written beside its place, to the disk, and then given its name at once, so
/// that it is whole or not there; then those that are not to be kept are removed.
///
///     CheckpointStore store(run / "checkpoints");
///     if (const auto newest = store.newest()) load(trainer, StateReader(*newest));
///     while (!trainer.done()) {
///         trainer.step();
///         if (is_time && !store.is_busy()) store.save(state_of(trainer));
///         for (const std::string& warning : store.warnings()) ...
///     }
///
/// Faults:  whatever goes wrong while one is written is a warning: those before it are untouched, and the next save()
///          tries anew. On a full disk the oldest gives way to the new one.
/// Threads: no two calls at the same time; one thread of its own, while it writes.
class CheckpointStore {
public:
    /// Errors: ErrorKind::usage unless keep >= 1, keep_every is above 0 and memory_bytes at least 0. The folder is made
    ///         with the first checkpoint. What a run that was killed left of one half written, or half removed, goes.
    explicit CheckpointStore(std::filesystem::path folder, CheckpointOptions options = {},
                             FileSystem& files = system_files());
    CheckpointStore(const CheckpointStore&) = delete;
    CheckpointStore& operator=(const CheckpointStore&) = delete;
    /// Waits for what is being written.
    ~CheckpointStore();

    /// The newest one that is whole, and with `healthy` was healthy. Those newer that are corrupted are named in
    /// warnings().
    /// Errors: ErrorKind::bad_data, naming each, if there are some and none is whole, or if the folder cannot be read;
    ///         AnotherVersion if the newest that is whole is one.
    std::optional<StateDict> newest(bool healthy = false);

    /// The next save() of this progress writes nothing: it is that of a checkpoint that is there. `damaged` are those
    /// that another store's newest() passed over.
    void go_on_from(const StateDict& state, const std::vector<std::filesystem::path>& damaged = {});

    /// Removes those that are newer than the one gone on from, but for damaged ones: their steps are made again.
    /// Errors: ErrorKind::bad_data if the folder cannot be read; as FileSystem's.
    void abandon_newer() const;

    /// The steps of the newest that says it is healthy; it is not read further. None if there is none.
    std::optional<std::int64_t> newest_healthy() const;

    /// Those that newest() passed over; one that is written anew is none of them any more.
    const std::vector<std::filesystem::path>& damaged() const { return damaged_; }

    /// Copies the tensors that the next step changes and writes from the copy in a thread. Without room for the copy,
    /// where a snapshot is in a file (which is read while it is written) or a thread cannot be had, as save_now().
    /// Requires: not is_busy(); it is waited for.
    void save(StateDict state);

    /// Returns when it is written, or has failed. True if it, or one of the same progress before it, is on the disk.
    bool save_now(const StateDict& state);

    /// True while the thread writes.
    bool is_busy() const;

    /// What went wrong since the last call, of what is finished; frees the copy of what is.
    std::vector<std::string> warnings();

    /// How many have been written, of those that are finished.
    std::int64_t written() const { return written_; }

    /// Waits for the thread and frees its copy. True if there was one.
    bool release();

    /// What the copy takes of memory; until warnings() or release() after it is written.
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
    std::optional<Progress> saved_;   // of the last that was written or read
    std::int64_t saved_samples_ = 0;  // of the batch after it
    std::int64_t written_ = 0;
    std::vector<std::filesystem::path> damaged_;
    std::vector<std::string> warnings_;
};

}  // namespace microbatch
