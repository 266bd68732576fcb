#include "microbatch/memory/probe.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <limits>

#include "microbatch/core/batch_plan.h"
#include "microbatch/core/error.h"
#include "microbatch/core/text.h"
#include "microbatch/core/units.h"

namespace microbatch {
namespace {

// A larger micro-batch has stopped paying once two sizes in a row are not this much faster than the best before.
constexpr double worthwhile = 0.99;
constexpr double tie = 1.02;

class Prober {
public:
    Prober(std::int64_t batch, std::int64_t budget, const Measure& measure, std::int64_t uncut_saving)
        : batch_(batch), budget_(budget), measure_(measure), uncut_saving_(uncut_saving) {}

    Probe run() {
        try_size(1);
        if (!result_.candidates.front().fits) {
            try_uncut_only();
        } else {
            if (batch_ >= 2) try_size(2);
            for (std::int64_t size = 4; size < batch_ && pays(); size = size > batch_ / 2 ? batch_ : 2 * size) {
                if (!try_if_predicted_to_fit(size)) break;
            }
            if (batch_ > 2) try_largest();
            if (batch_ > 2) consider_uncut();
        }
        std::sort(result_.candidates.begin(), result_.candidates.end(),
                  [](const Candidate& a, const Candidate& b) { return a.micro_batch < b.micro_batch; });
        choose();
        if (points_.size() >= 2) result_.memory = fit_memory(points_);
        return result_;
    }

private:
    // Measures a size and keeps what came of it.
    void try_size(std::int64_t size) {
        Candidate candidate{.micro_batch = size, .micro_batches = micro_batch_count(batch_, size)};
        if (points_.size() >= 2) candidate.predicted_peak_bytes = predict(size);
        candidate.measured = measure(size);
        if (candidate.measured) {
            const Measurement& measured = *candidate.measured;
            if (points_.size() < 2) candidate.predicted_peak_bytes = measured.peak_bytes;
            candidate.fits = measured.peak_bytes <= budget_;
            candidate.step_seconds =
                static_cast<double>(batch_) / static_cast<double>(size) * measured.micro_batch_seconds +
                measured.update_seconds;
            points_.push_back({size, measured.peak_bytes + saving(size)});
        }
        judge_pace(candidate);
        last_fits_ = candidate.fits;
        result_.candidates.push_back(candidate);
    }

    std::optional<Measurement> measure(std::int64_t size) const {
        try {
            return measure_(size);
        } catch (const c10::OutOfMemoryError&) {
            return std::nullopt;
        }
    }

    void judge_pace(const Candidate& candidate) {
        const bool faster = candidate.fits && candidate.step_seconds < worthwhile * best_seconds_;
        not_paying_ = faster ? 0 : not_paying_ + 1;
        if (candidate.fits) best_seconds_ = std::min(best_seconds_, candidate.step_seconds);
    }

    void add_unmeasured(std::int64_t size) {
        Candidate candidate{.micro_batch = size, .micro_batches = micro_batch_count(batch_, size)};
        if (points_.size() >= 2) {
            candidate.predicted_peak_bytes = predict(size);
            candidate.fits = candidate.predicted_peak_bytes <= budget_;
        }
        result_.candidates.push_back(candidate);
    }

    bool try_if_predicted_to_fit(std::int64_t size) {
        if (predict(size) > budget_) {
            add_unmeasured(size);
            return false;
        }
        try_size(size);
        return result_.candidates.back().fits;
    }

    // Between the last doubling and the next lies the largest that fits; with few, large samples that matters.
    void try_largest() {
        if (!pays()) return;
        const std::int64_t largest = largest_that_fits(fit_memory(points_), budget_, batch_);
        if (largest > points_.back().micro_batch) try_size(largest);
    }

    // The uncut batch is the last row, measured if it may fit and larger ones still pay.
    void consider_uncut() {
        const bool known = std::any_of(result_.candidates.begin(), result_.candidates.end(),
                                       [this](const Candidate& c) { return c.micro_batch == batch_; });
        if (known) return;
        const bool measurable = uncut_saving_ > 0 && points_.size() >= 2 && predict(batch_) <= budget_;
        measurable&& not_paying_ < 2 ? try_size(batch_) : add_unmeasured(batch_);
    }

    void try_uncut_only() {
        const std::optional<Measurement> smallest = result_.candidates.front().measured;
        const bool hopeless =
            batch_ == 1 || uncut_saving_ == 0 || (smallest && smallest->peak_bytes - uncut_saving_ > budget_);
        if (!hopeless) try_size(batch_);
        if (!hopeless && result_.candidates.back().fits) return;
        const std::string needed =
            smallest ? text("needs ", format_bytes(smallest->peak_bytes), ", ",
                            format_bytes(smallest->peak_bytes - budget_), " more than the memory budget of ")
                     : std::string("does not fit the memory budget of ");
        throw Error(ErrorKind::does_not_fit, text("a micro-batch of 1 sample ", needed, format_bytes(budget_),
                                                  ": raise the budget, or take a smaller model or shorter samples"));
    }

    bool pays() const { return not_paying_ < 2 && points_.size() >= 2 && last_fits_; }

    std::int64_t saving(std::int64_t size) const { return size == batch_ ? uncut_saving_ : 0; }
    std::int64_t predict(std::int64_t size) const { return fit_memory(points_).predict(size) - saving(size); }

    void choose() {
        double fastest = std::numeric_limits<double>::infinity();
        for (const Candidate& candidate : result_.candidates) {
            if (candidate.fits && candidate.measured) fastest = std::min(fastest, candidate.step_seconds);
        }
        const auto chosen =
            std::find_if(result_.candidates.begin(), result_.candidates.end(), [fastest](const Candidate& candidate) {
                return candidate.fits && candidate.measured && candidate.step_seconds <= tie * fastest;
            });
        result_.chosen = static_cast<std::size_t>(chosen - result_.candidates.begin());
    }

    std::int64_t batch_;
    std::int64_t budget_;
    const Measure& measure_;
    std::int64_t uncut_saving_;
    Probe result_;
    std::vector<MemoryPoint> points_;
    double best_seconds_ = std::numeric_limits<double>::infinity();
    int not_paying_ = 0;      // sizes measured in a row that were not worthwhile
    bool last_fits_ = false;  // the size measured last
};

}  // namespace

Probe probe_micro_batches(std::int64_t batch, std::int64_t budget_bytes, const Measure& measure,
                          std::int64_t uncut_saving_bytes) {
    if (batch < 1) throw Error(ErrorKind::usage, text("the batch is ", batch, "; it must be at least 1"));
    if (budget_bytes < 1) {
        throw Error(ErrorKind::usage, text("the memory budget is ", budget_bytes, " bytes; it must be above 0"));
    }
    return Prober(batch, budget_bytes, measure, uncut_saving_bytes).run();
}

}  // namespace microbatch
