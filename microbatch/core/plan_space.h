#pragma once

#include <cstdint>
#include <limits>
#include <map>
#include <optional>
#include <set>

#include "microbatch/core/plan_report.h"
#include "microbatch/core/planner.h"
#include "microbatch/core/trials.h"

namespace microbatch {

/// What is known of the plans with recompute, or of those without.
struct Mode {
    bool recompute = false;
    Trials trials;
    std::map<std::int64_t, PhasePeaks> expected = {};               ///< by size: predicted before the trial
    double best_seconds = std::numeric_limits<double>::infinity();  ///< of a step that fits
    int not_paying = 0;                                             ///< sizes in a row that were not worthwhile
};

/// What a planner knows after some trials, and what follows for all plans.
struct PlanSpace {
    const PlannerOptions& options;
    Mode kept;  ///< all activations are kept
    Mode recomputed;
    std::int64_t smallest = 1;  ///< micro-batch that the model can train on
    std::optional<UpdateTrial> update = {};
    bool update_failed = false;  ///< it does not fit even beyond the budget: peaks are unknown

    Plan plan(const Mode& mode, std::int64_t size) const;
    /// Whether the options allow such plans.
    bool allowed(const Mode& mode) const;
    /// True for a size that no other tells anything about: the whole batch, where all smaller micro-batches run together.
    bool runs_alone(std::int64_t size) const { return options.batch_norm == BatchNorm::exact && size == options.batch; }
    /// Twice the size, but at most the batch.
    std::int64_t doubled(std::int64_t size) const;
    /// True if the optimizer's step does not fit, and so no plan does.
    bool hopeless() const;
    /// False if the trial of the smallest size shows that even the first micro-batch does not fit in addition to the
    /// optimizer's state.
    bool uncut_may_fit(const Mode& mode) const;
    /// Time of the whole batch and the optimizer's step.
    double step_seconds(const Mode& mode, std::int64_t size) const;
    /// Lower bound of step_seconds(), see Trials::least_seconds().
    double least_step(const Mode& mode, std::int64_t size) const;
    /// Bytes of optimizer state that did not exist in the trials of micro-batches, but will in a run.
    std::int64_t later_state() const;
    /// nullopt where too little is known.
    std::optional<PhasePeaks> predict(const Mode& mode, std::int64_t size) const;
    bool predicted_to_fit(const Mode& mode, std::int64_t size) const;
    /// True if the size was tried and fits.
    bool fits(const Mode& mode, std::int64_t size) const;
    bool any_fits() const;
    /// Peak of the optimizer's steps, a lower bound of every plan's; 0 before they were tried.
    std::int64_t update_peak() const;
    /// The smallest measured peak; the largest int64 if no peak was measured.
    std::int64_t least_peak() const;
    /// The largest micro-batch below the batch that is predicted to fit; 0 if none is.
    std::int64_t largest_that_fits(const Mode& mode) const;
    /// The smallest size that splits the batch into as many micro-batches as this one: as fast, with less memory.
    std::int64_t evened(std::int64_t size) const;
    /// The rows of the report: all tried sizes, the smallest size and its doubles up to the first that does not fit,
    /// the fewest micro-batches that fit, and the whole batch.
    std::set<std::int64_t> sizes(const Mode& mode) const;
    Candidate candidate(const Mode& mode, std::int64_t size) const;
};

/// Throws ErrorKind::usage for options that are out of range or contradict each other.
void validate(const PlannerOptions& options);

/// The seconds, or `otherwise` if no clock can have measured them.
double time_or(double seconds, double otherwise);

}  // namespace microbatch
