#include "microbatch/core/trials.h"

#include <algorithm>
#include <iterator>
#include <utility>
#include <vector>

namespace microbatch {

void Trials::add(std::int64_t size, MicroBatchTrial trial) {
    trials_.insert_or_assign(size, std::move(trial));
    first_ = fit(&MicroBatchTrial::first);
    later_ = fit(&MicroBatchTrial::later);
}

void Trials::add_time(std::int64_t size, double seconds) {
    std::vector<double>& times = more_times_[size];
    times.push_back(seconds);
    if (times.size() < 2) return;
    std::vector<double> sorted = times;
    std::sort(sorted.begin(), sorted.end());
    // The smaller of two: disturbances only make a measurement longer.
    trials_.at(size).seconds = sorted[(sorted.size() - 1) / 2];
}

void Trials::add_failure(std::int64_t size) {
    if (size == batch_) {
        uncut_failed_ = true;
    } else {
        smallest_failure_ = std::min(smallest_failure_, size);
    }
}

bool Trials::failed(std::int64_t size) const {
    // A whole batch holds no gradients in its forward pass: it may fit where a smaller micro-batch does not.
    return size == batch_ ? uncut_failed_ : size >= smallest_failure_;
}

std::optional<MicroBatchPeaks> Trials::peaks(std::int64_t size) const {
    if (const auto trial = trials_.find(size); trial != trials_.end()) {
        return MicroBatchPeaks{peak_of(trial->second.first), peak_of(trial->second.later)};
    }
    const bool cut = size < batch_;
    if (!first_ || (cut && !later_)) return std::nullopt;
    MicroBatchPeaks result{first_->predict(size), cut ? later_->predict(size) : 0};
    for (const auto& [tried, trial] : trials_) {
        if (tried > size) break;
        result.first = std::max(result.first, peak_of(trial.first));
        if (cut) result.later = std::max(result.later, peak_of(trial.later));
    }
    return result;
}

double Trials::seconds(std::int64_t size) const {
    if (trials_.empty()) return 0.0;
    const auto right = trials_.lower_bound(size);
    if (right != trials_.end() && right->first == size) return right->second.seconds;
    if (trials_.size() == 1 || right == trials_.begin()) {
        const auto& [tried, trial] = *trials_.begin();
        return trial.seconds * (static_cast<double>(size) / static_cast<double>(tried));
    }
    return right == trials_.end() ? least_seconds(size) : on_line(std::prev(right), right, size);
}

double Trials::least_seconds(std::int64_t size) const {
    const auto right = trials_.lower_bound(size);
    if (trials_.contains(size) || std::distance(trials_.begin(), right) < 2) return seconds(size);
    const double least =
        std::max(on_line(std::prev(right, 2), std::prev(right), size), std::prev(right)->second.seconds);
    return right == trials_.end() ? least : std::min(least, on_line(std::prev(right), right, size));
}

bool Trials::matched() const {
    return (!first_ || first_->matched) && (!later_ || later_->matched);
}

double Trials::on_line(Trial left, Trial right, std::int64_t size) {
    const double slope =
        (right->second.seconds - left->second.seconds) / static_cast<double>(right->first - left->first);
    return right->second.seconds + slope * static_cast<double>(size - right->first);
}

std::optional<MemoryModel> Trials::fit(MemoryProfile MicroBatchTrial::*phase) const {
    std::vector<MemoryPoint> points;
    for (const auto& [size, trial] : trials_) {
        const MemoryProfile& profile = trial.*phase;
        if (!profile.empty()) points.push_back({size, profile});
    }
    std::reverse(points.begin(), points.end());  // the largest size first
    if (points.size() < 2) return std::nullopt;
    for (std::size_t larger = 0; larger + 1 < points.size(); ++larger) {
        for (std::size_t smaller = larger + 1; smaller < points.size(); ++smaller) {
            if (points[smaller].profile.size() != points[larger].profile.size()) continue;
            return fit_memory(points[smaller], points[larger]);
        }
    }
    return fit_memory(points[1], points[0]);
}

}  // namespace microbatch
