#include "microbatch/run/run_checkpoints.h"

#include <utility>

#include "microbatch/core/str_cat.h"
#include "microbatch/memory/reclaim.h"
#include "microbatch/run/run_folder.h"

namespace microbatch {

RunCheckpoints::RunCheckpoints(const std::filesystem::path& run, RunCheckpointOptions options) : every_(options.every) {
    if (!options.enabled) return;
    // The log must be on the disk before a checkpoint that follows it.
    options.store.sync_first = {run / "metrics.jsonl", run};
    store_ = std::make_unique<CheckpointStore>(checkpoints_of(run), std::move(options.store));
}

void RunCheckpoints::go_on_from(const StateDict& state, const std::vector<std::filesystem::path>& damaged) {
    if (store_) {
        store_->go_on_from(state, damaged);
        store_->abandon_newer();
    }
    if (every_.count > 0) times_ = manifest_of(state).progress.in(every_.unit) / every_.count;
}

// Empty, with a warning, if there is not even memory to list what is to be written.
std::optional<StateDict> RunCheckpoints::state_of(const Progress& progress, const std::function<StateDict()>& state) {
    try {
        return state();
    } catch (const std::exception&) {
        const std::string why = message_of(std::current_exception());
        warnings_.push_back(
            str_cat("the checkpoint of step ", progress.steps, " was not written: ", why.substr(0, why.find('\n'))));
        return std::nullopt;
    }
}

bool RunCheckpoints::after_step(const Progress& progress, const std::function<StateDict()>& state) {
    if (!store_ || every_.count == 0) return false;
    const std::int64_t times = progress.in(every_.unit) / every_.count;
    due_ = due_ || times > times_;
    times_ = times;
    // The previous one is still being written: a step does not wait for it.
    if (!due_ || store_->is_busy()) return false;
    due_ = false;
    std::optional<StateDict> all = state_of(progress, state);
    if (all) store_->save(std::move(*all));
    return all.has_value();
}

bool RunCheckpoints::save_now(const Progress& progress, const std::function<StateDict()>& state) {
    if (!store_) return false;
    const std::optional<StateDict> all = state_of(progress, state);
    return all && store_->save_now(*all);
}

std::vector<std::string> RunCheckpoints::warnings() {
    std::vector<std::string> all = std::exchange(warnings_, {});
    if (store_) {
        for (std::string& warning : store_->warnings()) all.push_back(std::move(warning));
    }
    return all;
}

}  // namespace microbatch
