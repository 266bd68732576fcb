#include "microbatch/core/plan_space.h"

#include <algorithm>
#include <cmath>

#include "microbatch/core/error.h"

namespace microbatch {
namespace {

std::int64_t sum(std::int64_t bytes, std::int64_t more) {
    constexpr std::int64_t largest = std::numeric_limits<std::int64_t>::max();
    return more > 0 && bytes > largest - more ? largest : bytes + more;
}

// Time of the whole batch in micro-batches of this size.
template <class Seconds>
double step_of(std::int64_t batch, std::int64_t size, const Seconds& micro_batch_seconds) {
    const std::int64_t rest = batch % size;
    const std::int64_t count = batch / size;
    const double full = static_cast<double>(count) * micro_batch_seconds(size);
    return full + (rest > 0 ? micro_batch_seconds(rest) : 0.0);
}

}  // namespace

Plan PlanSpace::plan(const Mode& mode, std::int64_t size) const {
    return {.micro_batch = size, .recompute = mode.recompute, .batch_norm = options.batch_norm};
}

bool PlanSpace::allowed(const Mode& mode) const {
    if (mode.recompute) return options.offers_recompute && options.recompute != Recompute::never;
    return options.recompute != Recompute::always;
}

std::int64_t PlanSpace::doubled(std::int64_t size) const {
    return size > options.batch / 2 ? options.batch : 2 * size;
}

bool PlanSpace::hopeless() const {
    return update_failed || (update && update->first_peak_bytes > options.budget_bytes);
}

bool PlanSpace::uncut_may_fit(const Mode& mode) const {
    const auto least = mode.trials.peaks(smallest);
    return !least || sum(least->first, later_state()) <= options.budget_bytes;
}

double PlanSpace::step_seconds(const Mode& mode, std::int64_t size) const {
    const double update_seconds = update ? update->seconds : 0.0;
    return update_seconds + step_of(options.batch, size, [&](std::int64_t each) { return mode.trials.seconds(each); });
}

double PlanSpace::least_step(const Mode& mode, std::int64_t size) const {
    const double update_seconds = update ? update->seconds : 0.0;
    return update_seconds + step_of(options.batch, size, [&](std::int64_t each) {
               const double own = mode.trials.least_seconds(each);
               const std::int64_t common = mode.trials.largest();
               if (!mode.recompute || !kept.trials.contains(common)) return own;
               // More sizes are usually known without recompute, and time rises at the same ones.
               const double without = kept.trials.least_seconds(each);
               return std::max(own, without * mode.trials.seconds(common) / kept.trials.seconds(common));
           });
}

std::int64_t PlanSpace::later_state() const {
    return options.steps >= 2 && update ? update->state_bytes : 0;
}

std::optional<PhasePeaks> PlanSpace::predict(const Mode& mode, std::int64_t size) const {
    if (runs_alone(size) && !mode.trials.contains(size)) return std::nullopt;
    const auto peaks = mode.trials.peaks(size);
    if (!peaks || update_failed) return std::nullopt;
    PhasePeaks result{.first_micro_batch = sum(peaks->first, later_state()),
                      .later_micro_batches = peaks->later == 0 ? 0 : sum(peaks->later, later_state())};
    if (update) result.first_update = update->first_peak_bytes;
    if (update && options.steps >= 2) result.later_updates = update->later_peak_bytes;
    return result;
}

bool PlanSpace::predicted_to_fit(const Mode& mode, std::int64_t size) const {
    if (mode.trials.failed(size)) return false;
    const auto peaks = predict(mode, size);
    return peaks && peaks->largest() <= options.budget_bytes;
}

bool PlanSpace::fits(const Mode& mode, std::int64_t size) const {
    return mode.trials.contains(size) && predicted_to_fit(mode, size);
}

bool PlanSpace::any_fits() const {
    const auto any = [this](const Mode& mode) {
        const auto& trials = mode.trials.all();
        return std::any_of(trials.begin(), trials.end(), [&](const auto& one) { return fits(mode, one.first); });
    };
    return any(kept) || any(recomputed);
}

std::int64_t PlanSpace::update_peak() const {
    if (!update) return 0;
    return options.steps >= 2 ? std::max(update->first_peak_bytes, update->later_peak_bytes) : update->first_peak_bytes;
}

std::int64_t PlanSpace::least_peak() const {
    std::int64_t least = std::numeric_limits<std::int64_t>::max();
    for (const Mode* mode : {&kept, &recomputed}) {
        for (const auto& [size, trial] : mode->trials.all()) {
            if (const auto peaks = predict(*mode, size)) least = std::min(least, peaks->largest());
        }
    }
    return least;
}

std::int64_t PlanSpace::largest_that_fits(const Mode& mode) const {
    std::int64_t fitting = smallest - 1;
    std::int64_t end = options.batch;
    while (fitting + 1 < end) {
        const std::int64_t middle = fitting + (end - fitting) / 2;
        (predicted_to_fit(mode, middle) ? fitting : end) = middle;
    }
    return fitting < smallest ? 0 : fitting;
}

std::int64_t PlanSpace::evened(std::int64_t size) const {
    return micro_batch_count(options.batch, micro_batch_count(options.batch, size));
}

std::set<std::int64_t> PlanSpace::sizes(const Mode& mode) const {
    std::set<std::int64_t> result;
    for (const auto& [size, trial] : mode.trials.all()) result.insert(size);
    if (options.micro_batch && allowed(mode)) result.insert(*options.micro_batch);
    if (options.micro_batch || mode.trials.empty()) return result;
    for (std::int64_t size = smallest; size < options.batch; size = doubled(size)) {
        if (!predict(mode, size)) continue;
        result.insert(size);
        if (!predicted_to_fit(mode, size)) break;
    }
    // Once a size has failed, the predictions are off: do not try the limit of another mode.
    const std::int64_t largest = mode.trials.any_cut_failed() ? 0 : largest_that_fits(mode);
    if (largest > 0) result.insert(evened(largest));
    if (!runs_alone(options.batch)) result.insert(options.batch);
    return result;
}

Candidate PlanSpace::candidate(const Mode& mode, std::int64_t size) const {
    const double seconds = mode.trials.empty() ? 0.0 : step_seconds(mode, size);
    Candidate result{.plan = plan(mode, size),
                     .micro_batches = micro_batch_count(options.batch, size),
                     .step_seconds = std::isfinite(seconds) ? seconds : 0.0,
                     .time_measured = mode.trials.contains(size),
                     .fits = predicted_to_fit(mode, size)};
    if (result.time_measured) {
        result.measured = predict(mode, size);
        const auto before = mode.expected.find(size);
        if (before != mode.expected.end()) result.predicted = before->second;
    } else {
        result.predicted = predict(mode, size);
    }
    return result;
}

void validate(const PlannerOptions& options) {
    const auto require = [](bool good, const char* name, std::int64_t value, const char* rule) {
        require_that(good, "the ", name, " is ", value, "; it must be ", rule);
    };
    require(options.batch >= 1, "batch", options.batch, "at least 1");
    require(options.budget_bytes >= 1, "memory budget in bytes", options.budget_bytes, "above 0");
    require(options.steps >= 1, "number of steps", options.steps, "at least 1");
    if (options.micro_batch) {
        require(*options.micro_batch >= 1 && *options.micro_batch <= options.batch, "micro-batch", *options.micro_batch,
                "from 1 to the batch");
    }
    require_that(options.recompute != Recompute::always || options.offers_recompute,
                 "recompute was requested for a model that does not support it");
}

double time_or(double seconds, double otherwise) {
    return seconds >= 0.0 && std::isfinite(seconds) ? seconds : otherwise;
}

}  // namespace microbatch
