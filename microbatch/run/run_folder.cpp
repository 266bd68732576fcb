#include "microbatch/run/run_folder.h"

#include <string_view>
#include <system_error>
#include <utility>

#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"
#include "microbatch/io/checkpoint_store.h"

namespace microbatch {
namespace {

// A broken link counts too: writing through it would write elsewhere.
bool is_there(const std::filesystem::path& path) {
    std::error_code ignored;
    return std::filesystem::exists(std::filesystem::symlink_status(path, ignored));
}

}  // namespace

std::filesystem::path checkpoints_of(const std::filesystem::path& run) {
    return run / "checkpoints";
}

RunFolder::RunFolder(std::filesystem::path path, bool resume) : path_(std::move(path)), resume_(resume) {
    if (std::filesystem::exists(path_)) lock_.emplace(path_);
    if (!resume_) {
        refuse_used();
        return;
    }
    if (!find_state(/*healthy=*/false)) refuse_files_without_checkpoint();
}

// Does not overwrite the weights of a finished run, or a page of something else.
void RunFolder::refuse_files_without_checkpoint() const {
    for (const char* name : {"model.safetensors", "report.html", "summary.json"}) {
        const bool own_page = is_there(path_ / "metrics.jsonl") && std::string_view(name) != "model.safetensors";
        if (!is_there(path_ / name) || own_page) continue;
        throw Error(ErrorKind::usage,
                    str_cat(path_.string(), ": there is no checkpoint to resume from, and a new run would overwrite ",
                            name, "; name a new folder for this run, or move that file away"));
    }
}

void RunFolder::lock() {
    if (lock_) return;
    lock_.emplace(path_);
    // It did not exist before; another process may have created it and finished already.
    refuse_used();
}

void RunFolder::refuse_used() const {
    for (const char* name : {"config.toml", "metrics.jsonl", "model.safetensors", "report.html", "summary.json"}) {
        if (!is_there(path_ / name)) continue;
        throw Error(ErrorKind::usage, str_cat(path_.string(), ": ", name,
                                              " already exists; resume that run (--resume), or name a new folder for "
                                              "this one"));
    }
}

bool RunFolder::find_state(bool healthy) {
    CheckpointStore store(checkpoints_of(path_));
    std::optional<StateDict> found = store.newest(healthy);
    if (!found) return false;
    state_ = std::move(found);
    warnings_ = store.warnings();
    damaged_ = store.damaged();
    return true;
}

bool RunFolder::use_healthy() {
    const std::int64_t newest = manifest_of(*state_).progress.steps;
    if (!find_state(/*healthy=*/true)) return false;
    passed_over_ = newest;
    return true;
}

void RunFolder::remove_snapshots() const {
    std::error_code failure;
    std::vector<std::filesystem::path> left;
    std::filesystem::directory_iterator entry(path_, failure);
    for (; !failure && entry != std::filesystem::directory_iterator(); entry.increment(failure)) {
        const std::string name = entry->path().filename().string();
        if (name.starts_with("snapshot-") && name.ends_with(".bin")) left.push_back(entry->path());
    }
    for (const auto& path : left) std::filesystem::remove(path, failure);
}

void RunFolder::remove_unused(const std::filesystem::path& events) const {
    std::error_code ignored;
    std::filesystem::remove(events, ignored);
    std::filesystem::remove(path_ / "config.toml", ignored);
    std::filesystem::remove(path_ / "metrics.jsonl", ignored);
    std::filesystem::remove(path_, ignored);  // only if it is empty
}

}  // namespace microbatch
