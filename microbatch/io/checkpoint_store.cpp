#include "microbatch/io/checkpoint_store.h"

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <system_error>
#include <utility>

#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"
#include "microbatch/runtime/parallel.h"

namespace microbatch {
namespace {

constexpr const char* unfinished = ".part";
constexpr const char* removed = ".old";

std::optional<std::int64_t> number_in(std::string_view digits) {
    std::int64_t number = 0;
    const auto [end, failure] = std::from_chars(digits.data(), digits.data() + digits.size(), number);
    const bool sound = failure == std::errc() && end == digits.data() + digits.size() && number >= 0;
    return sound ? std::optional(number) : std::nullopt;
}

std::string name_of(std::int64_t steps, std::int64_t open_samples) {
    std::string digits = std::to_string(steps);
    digits.insert(0, digits.size() < 8 ? 8 - digits.size() : 0, '0');
    return "step-" + digits + (open_samples > 0 ? str_cat("-", open_samples) : std::string());
}

// The size of everything that the next step changes, which excludes the snapshots.
std::int64_t bytes_to_own(const StateDict& state) {
    return state.bytes() - state.bytes("recovery/");
}

// Includes headers, scalars, the manifest, and rounding to blocks.
std::int64_t bytes_to_write(const StateDict& state) {
    constexpr std::int64_t of_files = std::int64_t{1} << 16U, of_a_tensor = std::int64_t{1} << 10U;
    return state.bytes() + of_files + of_a_tensor * std::ssize(state.tensors());
}

void own_tensors(StateDict& state) {
    for (const char* section : {"model/", "optimizer/", "batch/", "rng/"}) state.own(section);
}

// The message of any exception in the thread, which would otherwise be lost.
std::string failure_of(const std::function<void()>& call) {
    try {
        call();
        return {};
    } catch (const c10::Error& error) {
        return error.what_without_backtrace();
    } catch (const std::exception& error) {
        return error.what();
    } catch (...) {
        return "unknown error";
    }
}

}  // namespace

/// The progress of a checkpoint, and its folder.
struct CheckpointStore::Place {
    std::int64_t steps, open_samples;
    std::filesystem::path path;

    // Parses the name; empty if it is not that of a checkpoint.
    static std::optional<Place> of(const std::filesystem::path& path) {
        const std::string name = path.filename().string();
        if (!name.starts_with("step-")) return std::nullopt;
        const std::size_t dash = name.find('-', 5);
        const auto steps = number_in(std::string_view(name).substr(5, dash - 5));
        const auto open = dash == std::string::npos ? 0 : number_in(std::string_view(name).substr(dash + 1));
        if (!steps || !open) return std::nullopt;
        return Place{*steps, *open, path};
    }

    // None where it cannot be read.
    std::optional<CheckpointManifest> manifest() const {
        std::optional<CheckpointManifest> found;
        failure_of([&] { found = read_checkpoint_manifest(path); });
        return found;
    }

    bool is_healthy() const {
        const auto found = manifest();
        return found && found->healthy;
    }

    bool operator<(const Place& other) const {
        return std::pair(steps, open_samples) < std::pair(other.steps, other.open_samples);
    }
};

/// The data of the writing thread.
struct CheckpointStore::Writing {
    StateDict state;
    std::future<std::string> warning;  // of write(), or its exception; destroyed first, because it waits
};

CheckpointStore::CheckpointStore(std::filesystem::path folder, CheckpointOptions options, FileSystem& files)
    : folder_(std::move(folder)), options_(std::move(options)), files_(files) {
    const auto refuse = [](const auto&... what) { throw Error(ErrorKind::usage, "checkpoints: ", what...); };
    if (options_.keep < 1) refuse("keep is ", options_.keep, "; it must be at least 1");
    if (options_.memory_bytes < 0) refuse("memory_bytes is ", options_.memory_bytes, "; it must be at least 0");
    if (options_.keep_every && options_.keep_every->count < 1) {
        refuse("keep_every is ", to_string(*options_.keep_every), "; it must be above 0");
    }
    remove_leftovers();
}

CheckpointStore::~CheckpointStore() {
    release();
}

std::vector<CheckpointStore::Place> CheckpointStore::places() const {
    std::vector<Place> found;
    std::error_code failure;
    const auto there = std::filesystem::symlink_status(folder_, failure);
    if (there.type() == std::filesystem::file_type::not_found) return found;
    for (const auto& path : paths_in(folder_, failure)) {
        if (auto place = Place::of(path)) found.push_back(std::move(*place));
    }
    // An incomplete list must not be taken for a complete one.
    if (failure) {
        throw Error(ErrorKind::bad_data, "cannot read the checkpoints in ", folder_.string(), ": ", failure.message());
    }
    std::sort(found.begin(), found.end());
    return found;
}

void CheckpointStore::remove_leftovers() {
    std::error_code failure;
    for (const auto& path : paths_in(folder_, failure)) {
        const std::string extension = path.extension().string();
        const bool leftover = extension == unfinished || extension == removed;
        // Leftovers are harmless, so failing to delete one is ignored.
        if (leftover && Place::of(path.stem())) failure_of([&] { files_.remove_all(path); });
    }
}

std::optional<StateDict> CheckpointStore::newest(bool healthy) {
    std::vector<std::string> damaged;
    std::vector<Place> all = places();
    for (auto place = all.rbegin(); place != all.rend(); ++place) {
        try {
            if (healthy && !read_checkpoint_manifest(place->path).healthy) continue;
            StateDict state = read_checkpoint(place->path);
            go_on_from(state);
            for (const std::string& why : damaged) warnings_.push_back(str_cat("a checkpoint was skipped: ", why));
            return state;
        } catch (const AnotherVersion&) {
            throw;  // it is valid, but has another format version
        } catch (const Error& error) {
            damaged.emplace_back(error.what());
            damaged_.push_back(place->path);
        }
    }
    if (damaged.empty()) return std::nullopt;
    std::string message = str_cat("no checkpoint in ", folder_.string(), " is valid");
    for (const std::string& why : damaged) message += "; " + why;
    throw Error(ErrorKind::bad_data, message + "; start the run again in a new folder");
}

void CheckpointStore::go_on_from(const StateDict& state, const std::vector<std::filesystem::path>& damaged) {
    damaged_.insert(damaged_.end(), damaged.begin(), damaged.end());
    const CheckpointManifest what = manifest_of(state);
    saved_ = what.progress;
    saved_samples_ = what.open_samples;
}

bool CheckpointStore::is_damaged(const Place& place) const {
    return std::find(damaged_.begin(), damaged_.end(), place.path) != damaged_.end();
}

void CheckpointStore::abandon_newer() const {
    const Place at{saved_.value_or(Progress{}).steps, saved_samples_, {}};
    for (const Place& place : places()) {
        if (at < place && !is_damaged(place)) remove(place.path);
    }
}

std::optional<std::int64_t> CheckpointStore::newest_healthy() const {
    std::optional<std::int64_t> steps;
    failure_of([&] {
        for (const Place& place : places()) {
            if (place.is_healthy()) steps = place.steps;
        }
    });
    return steps;
}

bool CheckpointStore::is_saved(const CheckpointManifest& what) const {
    return saved_ == what.progress && saved_samples_ == what.open_samples;
}

// The first at or after a multiple.
bool CheckpointStore::is_kept(const Progress& progress) const {
    if (!options_.keep_every) return false;
    const auto multiple = [this](const Progress& at) {
        return at.in(options_.keep_every->unit) / options_.keep_every->count;
    };
    return multiple(progress) > multiple(saved_.value_or(Progress{}));
}

// Throws if it is not on the disk at the end; returns what else went wrong. On a full disk, deletes older ones.
std::string CheckpointStore::write(const StateDict& state) const {
    while (true) {
        try {
            return write_once(state);
        } catch (const Error& error) {
            const std::int64_t of_others = options_.parts == nullptr ? 0 : options_.parts->bytes_beside(state);
            const std::string lack = lack_of_space(folder_, bytes_to_write(state) + of_others);
            if (error.kind() != ErrorKind::not_written || lack.empty()) throw;
            if (!remove_oldest()) throw Error(ErrorKind::not_written, error.what() + lack);
        }
    }
}

// Deletes the oldest checkpoint that is neither the only one, nor the only healthy one, nor kept. Returns false if all
// checkpoints must stay.
bool CheckpointStore::remove_oldest() const {
    const std::vector<Place> all = places();
    if (all.size() < 2) return false;
    const auto healthy = std::count_if(all.begin(), all.end(), [](const Place& place) { return place.is_healthy(); });
    for (const Place& place : all) {
        const auto found = place.manifest();
        if (!found || found->kept || (found->healthy && healthy < 2)) continue;
        return failure_of([&] { remove(place.path); }).empty();
    }
    return false;
}

std::string CheckpointStore::write_once(const StateDict& state) const {
    const CheckpointManifest what = manifest_of(state);
    const Progress& progress = what.progress;
    const Place place{progress.steps, what.open_samples, folder_ / name_of(progress.steps, what.open_samples)};
    std::filesystem::path beside = place.path;
    beside += unfinished;
    make_folders_to_the_disk(files_, folder_);
    files_.remove_all(beside);
    std::string warning;
    std::exception_ptr lost;  // a process that no other attempt brings back
    const std::string failure = failure_of([&] {
        files_.make_folder(beside);
        try {
            write_checkpoint(files_, beside, state, is_kept(progress), options_.parts);
        } catch (const Error& error) {
            if (error.kind() == ErrorKind::lost_rank) lost = std::current_exception();
            throw;
        }
        // A log must not prevent a checkpoint.
        for (const auto& file : options_.sync_first) {
            const std::string why = failure_of([&] { files_.sync(file); });
            if (!why.empty()) warning = str_cat("before writing a checkpoint: ", why);
        }
        // An existing one of this name is corrupted (otherwise it would have been resumed), or not known to be on the
        // disk.
        if (std::filesystem::exists(place.path)) remove(place.path);
        files_.rename(beside, place.path);
    });
    if (!failure.empty()) {
        failure_of([&] { files_.remove_all(beside); });  // frees its space on a full disk
        if (lost) std::rethrow_exception(lost);
        throw Error(ErrorKind::not_written, failure);
    }
    files_.sync(folder_);
    const std::string left = failure_of([&] { remove_old(place); });
    if (left.empty()) return warning;
    return (warning.empty() ? "" : warning + "; ") + "an old checkpoint could not be deleted: " + left;
}

void CheckpointStore::remove_old(const Place& newest) const {
    std::vector<Place> all = places();
    std::erase_if(all, [&newest](const Place& place) { return newest < place; });
    // A corrupted checkpoint does not take the place of a valid one.
    const auto is_whole = [&](const Place& place) { return place.path == newest.path || !is_damaged(place); };
    const auto damaged = std::stable_partition(all.begin(), all.end(), is_whole);
    const auto passing = all.begin() + std::max<std::ptrdiff_t>(0, damaged - all.begin() - options_.keep);
    std::vector<Place> old(all.begin(), passing);
    old.insert(old.end(), damaged, all.end());
    const auto is_healthy = [&](const Place& place) { return is_whole(place) && place.is_healthy(); };
    bool one_is_healthy = std::any_of(passing, damaged, is_healthy);
    for (auto place = old.rbegin(); place != old.rend(); ++place) {
        const auto found = place->manifest();
        const bool kept = !found || found->kept;  // what cannot be read now may be one that is to be kept
        const bool last_healthy = !one_is_healthy && is_healthy(*place);
        one_is_healthy = one_is_healthy || last_healthy;
        if (!kept && !last_healthy) remove(place->path);
    }
}

// First renames it to a name that is not a checkpoint's, so that half of a checkpoint is never read.
void CheckpointStore::remove(const std::filesystem::path& checkpoint) const {
    std::filesystem::path old = checkpoint;
    old += removed;
    files_.remove_all(old);
    files_.rename(checkpoint, old);
    files_.remove_all(old);
}

void CheckpointStore::save(StateDict state) {
    release();
    if (is_saved(manifest_of(state))) return;
    // Whatever prevents the copy, such as a lack of memory, does not prevent writing.
    const bool in_thread = options_.parts == nullptr && bytes_to_own(state) <= options_.memory_bytes &&
                           !state.reads_files() && failure_of([&] { own_tensors(state); }).empty();
    in_thread ? start(std::move(state)) : static_cast<void>(save_now(state));
}

void CheckpointStore::start(StateDict state) {
    writing_ = std::make_unique<Writing>(std::move(state), std::future<std::string>());
    try {
        writing_->warning = std::async(std::launch::async, [this, writing = writing_.get()] {
            at::get_num_threads();  // torch sets the number of a new thread, once
            const OneThread alone;
            return write(writing->state);
        });
    } catch (const std::exception&) {
        const std::unique_ptr<Writing> written = std::move(writing_);
        save_now(written->state);
    }
}

bool CheckpointStore::save_now(const StateDict& state) {
    release();
    const CheckpointManifest what = manifest_of(state);
    return is_saved(what) || conclude(what, [&] { return write(state); });
}

bool CheckpointStore::conclude(const CheckpointManifest& what, const std::function<std::string()>& write) {
    std::string warning;
    const std::string failure = failure_of([&] { warning = write(); });
    if (!failure.empty()) {
        warnings_.push_back(str_cat("the checkpoint of step ", what.progress.steps, " was not written: ", failure));
        return false;
    }
    if (!warning.empty()) warnings_.push_back(std::move(warning));
    ++written_;
    std::erase(damaged_, folder_ / name_of(what.progress.steps, what.open_samples));
    saved_ = what.progress;
    saved_samples_ = what.open_samples;
    return true;
}

bool CheckpointStore::is_busy() const {
    return writing_ && writing_->warning.wait_for(std::chrono::seconds(0)) != std::future_status::ready;
}

bool CheckpointStore::release() {
    if (!writing_) return false;
    const std::unique_ptr<Writing> written = std::move(writing_);
    conclude(manifest_of(written->state), [&] { return written->warning.get(); });
    return true;
}

std::vector<std::string> CheckpointStore::warnings() {
    if (!is_busy()) release();
    return std::exchange(warnings_, {});
}

std::int64_t CheckpointStore::memory_bytes() const {
    return writing_ ? bytes_to_own(writing_->state) : 0;
}

}  // namespace microbatch
