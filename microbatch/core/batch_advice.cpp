#include "microbatch/core/batch_advice.h"

#include <algorithm>
#include <cmath>

#include "microbatch/core/error.h"

namespace microbatch {
namespace {

constexpr double worthwhile = 0.95;
constexpr double few = 10.0;  // "few" is at most 1/10 above the minimum

double share(std::int64_t batch, std::int64_t samples) {
    return static_cast<double>(batch) / static_cast<double>(samples);
}

std::int64_t to_batch(double samples) {
    constexpr double largest = 0x1p62;
    return static_cast<std::int64_t>(std::clamp(samples, 1.0, largest));
}

// The fastest micro-batch into which the batch can be split; in a tie, the largest.
const TimedCut* fastest(std::span<const TimedCut> cuts, std::int64_t batch) {
    const TimedCut* best = nullptr;
    for (const TimedCut& cut : cuts) {
        if (cut.micro_batch > batch) continue;
        const bool tie = best != nullptr && cut.sample_seconds == best->sample_seconds;
        if (best == nullptr || cut.sample_seconds < best->sample_seconds ||
            (tie && cut.micro_batch > best->micro_batch)) {
            best = &cut;
        }
    }
    return best;
}

}  // namespace

std::vector<TimedCut> timed_cuts(const PlanReport& report) {
    std::vector<TimedCut> cuts;
    for (const Candidate& one : report.candidates) {
        if (!one.fits || !one.time_measured || one.step_seconds <= 0.0) continue;
        const double seconds = std::max(0.0, one.step_seconds - report.update_seconds);
        cuts.push_back({one.plan.micro_batch, seconds / static_cast<double>(report.batch)});
    }
    return cuts;
}

std::int64_t largest_to_compare(double noise_batch, std::int64_t batch) {
    constexpr double most = 1 << 20;
    return std::max(batch, static_cast<std::int64_t>(std::min(16.0 * noise_batch, most)));
}

bool BatchAdvice::accumulation_pays() const {
    if (!table[soonest].is_cut()) return false;
    return table[soonest].time < worthwhile * soonest_uncut.time;
}

// A product or quotient may be rounded to a whole number that it is not; the sign of fma() is exact.
std::int64_t batch_of_few_steps(double noise_batch) {
    const double batch = std::ceil(few * noise_batch);
    return to_batch(std::fma(few, noise_batch, -batch) > 0.0 ? batch + 1.0 : batch);
}

std::int64_t batch_of_few_samples(double noise_batch) {
    const double batch = std::floor(noise_batch / few);
    return to_batch(std::fma(few, batch, -noise_batch) > 0.0 ? batch - 1.0 : batch);
}

std::string describe_repetition(std::int64_t batch, std::int64_t samples) {
    if (batch <= samples) return "";
    return str_cat("a batch of ", batch, " holds each of the data's ", samples, " samples ",
                   std::round(10.0 * share(batch, samples)) / 10.0, " times");
}

void require_enough_data(std::int64_t batch, std::int64_t samples) {
    if (few * static_cast<double>(batch) <= static_cast<double>(samples)) return;
    const std::string repetition = describe_repetition(batch, samples);
    const std::int64_t percent = std::llround(100.0 * share(batch, samples));
    throw Error(
        ErrorKind::usage, "the data is too small to measure the noise of a batch of ", batch, ": ",
        repetition.empty() ? str_cat("it has ", samples, " samples, and a batch holds ", percent, " %") : repetition,
        "; use a batch of at most a tenth of the samples, or more data");
}

BatchAdvice advise_batch(double noise_batch, std::span<const TimedCut> cuts, double update_seconds,
                         std::int64_t largest, std::int64_t samples) {
    largest = std::min(largest, samples);
    require_that(std::isfinite(noise_batch) && noise_batch > 0.0, "the noise batch is ", noise_batch,
                 "; it must be finite and above 0");
    require_that(fastest(cuts, largest) != nullptr, "no measured micro-batch has at most ", largest, " samples");
    const std::int64_t smallest = std::ranges::min(cuts, {}, &TimedCut::micro_batch).micro_batch;
    BatchAdvice advice{.noise_batch = noise_batch, .samples = samples, .table = {}};
    const auto cost_of = [&](std::int64_t batch, const TimedCut& cut) {
        const auto size = static_cast<double>(batch);
        BatchCost cost{.batch = batch,
                       .micro_batch = cut.micro_batch,
                       .step_seconds = size * cut.sample_seconds + update_seconds,
                       .steps = 1.0 + noise_batch / size,
                       .samples = 1.0 + size / noise_batch};
        cost.time = cost.steps * cost.step_seconds;
        return cost;
    };
    for (std::int64_t batch = smallest;; batch *= 2) {
        advice.table.push_back(cost_of(batch, *fastest(cuts, batch)));
        if (advice.table.back().time < advice.table[advice.soonest].time) advice.soonest = advice.table.size() - 1;
        if (batch > largest / 2) break;
    }
    for (const TimedCut& cut : cuts) {
        if (cut.micro_batch > samples) continue;
        const BatchCost cost = cost_of(cut.micro_batch, cut);
        if (advice.soonest_uncut.time == 0.0 || cost.time < advice.soonest_uncut.time) advice.soonest_uncut = cost;
    }
    const double least = advice.table[advice.soonest].time;
    for (BatchCost& cost : advice.table) cost.time /= least;
    advice.soonest_uncut.time /= least;
    return advice;
}

}  // namespace microbatch
