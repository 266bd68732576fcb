#include "microbatch/run/run_folder.h"

#include <fcntl.h>
#include <pthread.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <mutex>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"
#include "microbatch/io/checkpoint_store.h"
#include "microbatch/io/file_system.h"
#include "microbatch/run/recovery.h"

namespace microbatch {
namespace {

// A broken link counts too: writing through it would write elsewhere.
bool is_there(const std::filesystem::path& path) {
    std::error_code ignored;
    return std::filesystem::exists(std::filesystem::symlink_status(path, ignored));
}

// The descriptors of all locks of this process. A child that is forked without exec, such as a worker that loads data,
// does not train: it closes its copies, or it would keep the locks after this process.
class Descriptors {
public:
    static Descriptors& all() {
        static auto* const descriptors = new Descriptors();  // a child may be forked while the process ends
        return *descriptors;
    }

    void add(int descriptor) {
        const std::lock_guard guard(mutex_);
        open_.push_back(descriptor);
    }

    void close(int descriptor) {
        const std::lock_guard guard(mutex_);
        if (std::erase(open_, descriptor) > 0) ::close(descriptor);
    }

private:
    Descriptors() {
        ::pthread_atfork([] { all().mutex_.lock(); }, [] { all().mutex_.unlock(); },
                         [] {
                             for (const int descriptor : all().open_) ::close(descriptor);
                             all().open_.clear();
                             all().mutex_.unlock();
                         });
    }

    std::mutex mutex_;
    std::vector<int> open_;
};

}  // namespace

RunLock::RunLock(const std::filesystem::path& folder) {
    make_folders_to_the_disk(system_files(), folder);
    // Locks the folder itself: leaves no file behind.
    descriptor_ = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (descriptor_ < 0) {
        throw Error(ErrorKind::usage, "cannot open the run folder ", folder.string(), ": ",
                    std::generic_category().message(errno));
    }
    Descriptors::all().add(descriptor_);
    held_ = ::flock(descriptor_, LOCK_EX | LOCK_NB) == 0;
    if (held_ || errno != EWOULDBLOCK) return;
    Descriptors::all().close(descriptor_);
    throw Error(ErrorKind::usage, "another process is training in ", folder.string(),
                ": wait for it, stop it, or name another folder for this run");
}

RunLock::~RunLock() {
    Descriptors::all().close(descriptor_);
}

std::filesystem::path checkpoints_of(const std::filesystem::path& run) {
    return run / "checkpoints";
}

RunFolder::RunFolder(std::filesystem::path path, bool resume, RunAccess access)
    : path_(std::move(path)), resume_(resume) {
    if (access == RunAccess::follows) {
        if (resume_) find_state(/*healthy=*/false);
        return;
    }
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
        throw Error(ErrorKind::usage, path_.string(),
                    ": there is no checkpoint to resume from, and a new run would overwrite ", name,
                    "; name a new folder for this run, or move that file away");
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
        throw Error(ErrorKind::usage, path_.string(), ": ", name,
                    " already exists; resume that run (--resume), or name a new folder for this one");
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
    if (!find_state(/*healthy=*/true)) {
        warnings_.push_back(
            str_cat("no checkpoint is from before the divergence: the run continues with the weights of step ", newest,
                    "; if the loss does not fall, start again in another folder"));
        return false;
    }
    forget_roll_backs(*state_);
    passed_over_ = newest;
    return true;
}

void RunFolder::remove_snapshots() const {
    std::error_code failure;
    for (const auto& path : paths_in(path_, failure)) {
        const std::string name = path.filename().string();
        if (name.starts_with("snapshot-") && name.ends_with(".bin")) std::filesystem::remove(path, failure);
    }
}

void RunFolder::remove_unused(const std::filesystem::path& events) const {
    std::error_code ignored;
    std::filesystem::remove(events, ignored);
    std::filesystem::remove(path_ / "config.toml", ignored);
    std::filesystem::remove(path_ / "metrics.jsonl", ignored);
    std::filesystem::remove(path_, ignored);  // only if it is empty
}

}  // namespace microbatch
