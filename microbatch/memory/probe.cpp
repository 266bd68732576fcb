#include "microbatch/memory/probe.h"

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
    Prober(std::int64_t batch, std::int64_t budget, const Measure& measure)
        : batch_(batch), budget_(budget), measure_(measure) {}

    Probe run() {
        add_measured(1, 0);
        require_smallest_fits();
        if (batch_ >= 2) add_measured(2, 0);
        for (std::int64_t size = 4; size < batch_ && pays(); size = size > batch_ / 2 ? batch_ : 2 * size) {
            if (!add_if_it_fits(size)) break;
        }
        if (batch_ > 2 && fits_all_so_far()) add_largest();
        if (batch_ > 2 && result_.candidates.back().micro_batch != batch_) add_unmeasured(batch_);
        std::sort(result_.candidates.begin(), result_.candidates.end(),
                  [](const Candidate& a, const Candidate& b) { return a.micro_batch < b.micro_batch; });
        choose();
        if (points_.size() >= 2) result_.memory = fit_memory(points_);
        return result_;
    }

private:
    void add_measured(std::int64_t size, std::int64_t predicted) {
        Candidate candidate = make(size, predicted);
        const Measurement measured = measure_(size);
        if (predicted == 0) candidate.predicted_peak_bytes = measured.peak_bytes;
        candidate.measured = measured;
        candidate.fits = measured.peak_bytes <= budget_;
        candidate.step_seconds =
            static_cast<double>(batch_) / static_cast<double>(size) * measured.micro_batch_seconds +
            measured.update_seconds;
        points_.push_back({size, measured.peak_bytes});
        not_paying_ = candidate.step_seconds < worthwhile * best_seconds_ ? 0 : not_paying_ + 1;
        if (candidate.fits) best_seconds_ = std::min(best_seconds_, candidate.step_seconds);
        result_.candidates.push_back(candidate);
    }

    void add_unmeasured(std::int64_t size) {
        Candidate candidate = make(size, fit_memory(points_).predict(size));
        candidate.fits = candidate.predicted_peak_bytes <= budget_;
        result_.candidates.push_back(candidate);
    }

    bool add_if_it_fits(std::int64_t size) {
        const std::int64_t predicted = fit_memory(points_).predict(size);
        if (predicted > budget_) {
            add_unmeasured(size);
            return false;
        }
        add_measured(size, predicted);
        return result_.candidates.back().fits;
    }

    // Between the last doubling and the next lies the largest that fits; with few, large samples that matters.
    void add_largest() {
        if (!pays()) return;
        const MemoryModel memory = fit_memory(points_);
        const std::int64_t largest = largest_that_fits(memory, budget_, batch_);
        if (largest > points_.back().micro_batch) add_measured(largest, memory.predict(largest));
    }

    bool fits_all_so_far() const { return points_.back().peak_bytes <= budget_; }
    bool pays() const { return not_paying_ < 2 && fits_all_so_far(); }

    Candidate make(std::int64_t size, std::int64_t predicted) const {
        return {size, micro_batch_count(batch_, size), predicted, std::nullopt, 0.0, false};
    }

    void require_smallest_fits() const {
        const std::int64_t needed = points_.front().peak_bytes;
        if (needed <= budget_) return;
        throw Error(ErrorKind::does_not_fit,
                    text("a micro-batch of 1 sample needs ", format_bytes(needed), ", ", format_bytes(needed - budget_),
                         " more than the memory budget of ", format_bytes(budget_),
                         ": raise the budget, or take a smaller model or shorter samples"));
    }

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
    Probe result_;
    std::vector<MemoryPoint> points_;
    double best_seconds_ = std::numeric_limits<double>::infinity();
    int not_paying_ = 0;
};

}  // namespace

Probe probe_micro_batches(std::int64_t batch, std::int64_t budget_bytes, const Measure& measure) {
    if (batch < 1) throw Error(ErrorKind::usage, text("the batch is ", batch, "; it must be at least 1"));
    if (budget_bytes < 1) {
        throw Error(ErrorKind::usage, text("the memory budget is ", budget_bytes, " bytes; it must be above 0"));
    }
    return Prober(batch, budget_bytes, measure).run();
}

}  // namespace microbatch
