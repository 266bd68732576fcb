#include "microbatch/run/recovery.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>

#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"

namespace microbatch {
namespace {

constexpr std::size_t most_points = RecoveryState::most_points;

void validate(const RecoveryOptions& options) {
    const auto require = [](bool good, const char* name, auto value, const char* rule) {
        if (!good) throw Error(ErrorKind::usage, str_cat("recovery: ", name, " is ", value, "; it must be ", rule));
    };
    require(options.most >= 0, "most", options.most, "at least 0");
    require(options.every >= 1, "every", options.every, "at least 1 step");
    require(options.margin >= 0, "margin", options.margin, "at least 0 steps");
    require(options.mend >= 0, "mend", options.mend, "at least 0 steps");
    require(options.warmup >= 0, "warmup", options.warmup, "at least 0 steps");
    require(options.cut > 0.0 && options.cut <= 1.0, "cut", options.cut, "above 0 and at most 1");
    require(options.memory_bytes >= 0, "memory_bytes", options.memory_bytes, "at least 0");
}

}  // namespace

Recovery::Recovery(Accumulator& accumulator, RecoveryOptions options)
    : accumulator_(&accumulator), options_(std::move(options)) {
    validate(options_);
}

std::string Recovery::keep(std::int64_t steps, const SpikeGuard& guard, const std::function<bool()>& release_memory) {
    const std::int64_t last = points_.empty() ? 0 : std::max(points_.back().steps, gone_back_at_);
    const bool due = points_.empty() || (steps - last >= options_.every && guard.is_calm());
    if (due && !failed_) {
        // Before the new one is made, so that there are never three.
        if (points_.size() == most_points) points_.pop_front();
        take(steps, guard, release_memory);
    }
    return std::exchange(warning_, {});
}

void Recovery::take(std::int64_t steps, const SpikeGuard& guard, const std::function<bool()>& release_memory) {
    const auto share = static_cast<std::int64_t>(options_.memory_bytes / most_points);
    try {
        add({steps, guard.state(), RunPoint(*accumulator_, share, new_file())});
        return;
    } catch (const c10::OutOfMemoryError&) {
        const bool returned = release_memory && release_memory();
        if (!returned && (options_.memory_bytes == 0 || options_.folder.empty())) return fail("out of memory");
        if (!returned) options_.memory_bytes = 0;
    } catch (const Error& error) {
        return fail(error.what());
    }
    take(steps, guard, release_memory);
}

void Recovery::add(Point point) {
    std::erase_if(in_use_, [](const auto& snapshot) { return snapshot.expired(); });
    in_use_.push_back(point.run.snapshot());
    points_.push_back(std::move(point));
}

void Recovery::fail(const std::string& why) {
    failed_ = true;
    warning_ = str_cat("no snapshot is taken any more: ", why);
}

std::optional<std::int64_t> Recovery::go_back(std::int64_t steps, SpikeGuard& guard) {
    const std::int64_t good = steps - guard.refused_in_a_row();  // the last step that was applied
    if (points_.empty() || good <= points_.front().steps) return std::nullopt;
    auto point = points_.rbegin();
    while (point + 1 != points_.rend() && point->steps > good - options_.margin) ++point;
    point->run.put_back(*accumulator_);
    points_.erase(point.base(), points_.end());
    guard.restore(points_.back().guard);
    const std::int64_t back_at = points_.back().steps;
    ++times_;
    gone_back_at_ = steps;
    return back_at;
}

double Recovery::rate_factor(std::int64_t steps) const {
    if (times_ == 0) return 1.0;
    const double before = std::pow(options_.cut, static_cast<double>(times_ - 1));
    const double cut = before * options_.cut;
    const std::int64_t since = steps - gone_back_at_ + 1;
    if (since < options_.warmup) return cut * static_cast<double>(since) / static_cast<double>(options_.warmup);
    const std::int64_t mending = since - options_.warmup;
    if (mending >= options_.mend) return before;
    return std::lerp(cut, before, static_cast<double>(mending) / static_cast<double>(options_.mend));
}

std::filesystem::path Recovery::new_file() {
    if (options_.folder.empty()) return {};
    // One of that name is of a process that was killed.
    std::filesystem::path file;
    do {
        file = options_.folder / str_cat("snapshot-", files_++, ".bin");
    } while (std::filesystem::exists(std::filesystem::symlink_status(file)));
    return file;
}

bool Recovery::give_up_memory() {
    const auto in_memory = [](const Point& point) { return point.run.memory_bytes() > 0; };
    if (std::none_of(points_.begin(), points_.end(), in_memory)) return false;
    options_.memory_bytes = 0;
    for (Point& point : points_) {
        if (!in_memory(point)) continue;
        try {
            point.run.move_to(new_file());
        } catch (const Error& error) {
            fail(error.what());
        }
    }
    std::erase_if(points_, in_memory);
    return true;
}

RecoveryState Recovery::state(const std::vector<std::string>& names) const {
    RecoveryState state{
        .times = times_, .gone_back_at = gone_back_at_, .in_files = options_.memory_bytes == 0, .failed = failed_};
    for (const Point& point : points_) {
        const auto& snapshot = point.run.snapshot();
        RecoveryState::Point written{
            point.steps, point.guard, {}, point.run.state_counts(), point.run.memory_bytes() == 0};
        for (std::size_t i = 0; i < snapshot->size(); ++i) {
            const std::string name = names.size() == snapshot->size() ? names[i] : str_cat("tensor.", i);
            written.tensors.push_back({name, snapshot->shape(i), [snapshot, i] { return snapshot->tensor(i); }});
        }
        state.points.push_back(std::move(written));
    }
    return state;
}

void Recovery::restore(const RecoveryState& state) {
    if (state.times < 0 || state.gone_back_at < 0 || state.points.size() > most_points) {
        throw Error(ErrorKind::usage, "recovery: this is the state of none");
    }
    for (const RecoveryState::Point& point : state.points) {
        if (point.steps < 0) throw Error(ErrorKind::usage, "recovery: this is the state of none");
        SpikeGuard().restore(point.guard);  // refuses what is none
    }
    Recovery restored = *this;
    restored.points_.clear();
    restored.times_ = state.times;
    restored.gone_back_at_ = state.gone_back_at;
    restored.failed_ = state.failed;
    const bool in_files = state.in_files && !options_.folder.empty();
    if (in_files) restored.options_.memory_bytes = 0;
    for (const RecoveryState::Point& point : state.points) {
        try {
            RunPoint run(restored.make_snapshot(point.tensors, in_files), point.state_counts);
            restored.add({point.steps, point.guard, std::move(run)});
        } catch (const Error& error) {
            if (error.kind() != ErrorKind::usage) throw;
            restored.fail(error.what());
            break;
        }
    }
    *this = std::move(restored);
}

Snapshot Recovery::make_snapshot(const StoredTensors& tensors, bool in_files) {
    const bool fits = bytes_of(tensors) <= static_cast<std::int64_t>(options_.memory_bytes / most_points);
    if (options_.folder.empty() || (fits && !in_files)) {
        try {
            std::vector<at::Tensor> all;
            for (const StoredTensor& tensor : tensors) all.push_back(get_own(tensor));
            return Snapshot::of_copies(std::move(all));
        } catch (const c10::OutOfMemoryError&) {
            if (options_.folder.empty()) throw;
            options_.memory_bytes = 0;
        }
    }
    return {tensors.size(), [&tensors](std::size_t i) { return tensors[i].get(); }, new_file()};
}

std::int64_t Recovery::memory_bytes() const {
    std::int64_t bytes = 0;
    for (const auto& one : in_use_) {
        if (const auto snapshot = one.lock()) bytes += snapshot->memory_bytes();
    }
    return bytes;
}

}  // namespace microbatch
