#include "microbatch/train/recovery.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>

#include "microbatch/core/error.h"
#include "microbatch/core/text.h"

namespace microbatch {
namespace {

constexpr int most_points = 2;

void validate(const RecoveryOptions& options) {
    const auto require = [](bool good, const char* name, auto value, const char* rule) {
        if (!good) throw Error(ErrorKind::usage, text("recovery: ", name, " is ", value, "; it must be ", rule));
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
    : accumulator_(accumulator), options_(std::move(options)) {
    validate(options_);
}

std::string Recovery::keep(std::int64_t steps, const SpikeGuard& guard) {
    const std::int64_t last = points_.empty() ? 0 : std::max(points_.back().steps, gone_back_at_);
    const bool due = points_.empty() || (steps - last >= options_.every && guard.is_calm());
    if (due && !failed_) {
        // Before the new one is made, so that there are never three.
        if (points_.size() == std::size_t{most_points}) points_.pop_front();
        take(steps, guard);
    }
    return std::exchange(warning_, {});
}

void Recovery::take(std::int64_t steps, const SpikeGuard& guard) {
    try {
        points_.push_back(
            {steps, guard.state(), RunPoint(accumulator_, options_.memory_bytes / most_points, new_file())});
    } catch (const c10::OutOfMemoryError&) {
        if (options_.memory_bytes == 0 || options_.folder.empty()) return fail("out of memory");
        options_.memory_bytes = 0;
        take(steps, guard);
    } catch (const Error& error) {
        fail(error.what());
    }
}

void Recovery::fail(const std::string& why) {
    failed_ = true;
    warning_ = text("no snapshot is taken any more: ", why);
}

std::optional<std::int64_t> Recovery::go_back(std::int64_t steps, SpikeGuard& guard) {
    const std::int64_t good = steps - guard.refused_in_a_row();  // the last step that was applied
    if (points_.empty() || good <= points_.front().steps) return std::nullopt;
    while (points_.size() > 1 && points_.back().steps + options_.margin > good) points_.pop_back();
    points_.back().run.put_back(accumulator_);
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
        file = options_.folder / text("snapshot-", files_++, ".bin");
    } while (std::filesystem::exists(std::filesystem::symlink_status(file)));
    return file;
}

bool Recovery::give_up_memory() {
    if (memory_bytes() == 0) return false;
    options_.memory_bytes = 0;
    for (Point& point : points_) {
        if (point.run.memory_bytes() == 0) continue;
        try {
            point.run.move_to(new_file());
        } catch (const Error& error) {
            fail(error.what());
        }
    }
    std::erase_if(points_, [](const Point& point) { return point.run.memory_bytes() > 0; });
    return true;
}

RecoveryState Recovery::state(const std::vector<std::string>& names) const {
    RecoveryState state{
        .times = times_, .gone_back_at = gone_back_at_, .in_files = options_.memory_bytes == 0, .failed = failed_};
    for (const Point& point : points_) {
        const auto snapshot = std::make_shared<const Snapshot>(point.run.snapshot());
        RecoveryState::Point written{point.steps, point.guard, {}, point.run.state_counts()};
        for (std::size_t i = 0; i < snapshot->size(); ++i) {
            const std::string name = names.size() == snapshot->size() ? names[i] : text("tensor.", i);
            written.tensors.push_back({name, snapshot->shape(i), [snapshot, i] { return snapshot->tensor(i); }});
        }
        state.points.push_back(std::move(written));
    }
    return state;
}

void Recovery::restore(const RecoveryState& state) {
    if (state.times < 0 || state.gone_back_at < 0 || state.points.size() > std::size_t{most_points}) {
        throw Error(ErrorKind::usage, "recovery: this is the state of none");
    }
    const bool in_files = state.in_files && !options_.folder.empty();
    std::deque<Point> points;
    for (const RecoveryState::Point& point : state.points) {
        if (point.steps < 0) throw Error(ErrorKind::usage, "recovery: this is the state of none");
        SpikeGuard().restore(point.guard);  // refuses what is none
        points.push_back(
            {point.steps, point.guard, RunPoint(make_snapshot(point.tensors, in_files), point.state_counts)});
    }
    points_ = std::move(points);
    times_ = state.times;
    gone_back_at_ = state.gone_back_at;
    failed_ = state.failed;
    if (in_files) options_.memory_bytes = 0;
}

Snapshot Recovery::make_snapshot(const StoredTensors& tensors, bool in_files) {
    const auto get = [&tensors](std::size_t i) { return tensors[i].get(); };
    const bool fits = bytes_of(tensors) <= options_.memory_bytes / most_points;
    if (!options_.folder.empty() && (in_files || !fits)) return {tensors.size(), get, new_file()};
    std::vector<at::Tensor> all;
    for (const StoredTensor& tensor : tensors) all.push_back(get_own(tensor));
    return Snapshot::of_copies(std::move(all));
}

std::int64_t Recovery::memory_bytes() const {
    std::int64_t bytes = 0;
    for (const Point& point : points_) bytes += point.run.memory_bytes();
    return bytes;
}

}  // namespace microbatch
