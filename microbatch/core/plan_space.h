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

/// The plans with recompute, or those without.
struct Mode {
    bool recompute = false;
    Trials trials;
    std::map<std::int64_t, PhasePeaks> expected = {};               ///< by size, what was predicted before it was tried
    double best_seconds = std::numeric_limits<double>::infinity();  ///< of a step that fits
    int not_paying = 0;                                             ///< sizes in a row that were not worthwhile
};

/// What a planner knows after some trials, and what that says of all plans.
struct PlanSpace {
    const PlannerOptions& options;
    Mode kept;  ///< all activations are kept
    Mode recomputed;
    std::int64_t smallest = 1;  ///< micro-batch that the model can train on
    std::optional<UpdateTrial> update = {};
    bool update_failed = false;  ///< no room for it anywhere: the peaks are not known

    /// By the options.
    bool allowed(const Mode& mode) const;
    /// At most the batch.
    std::int64_t doubled(std::int64_t size) const;
    /// An optimizer step does not fit: nor does any plan.
    bool hopeless() const;
    /// A trial of the smallest that fitted but for the optimizer's state, or none: then nothing speaks against it.
    bool uncut_may_fit(const Mode& mode) const;
    /// Of the whole batch and the optimizer's step.
    double step_seconds(const Mode& mode, std::int64_t size) const;
    /// The least that it can be, see Trials::least_seconds().
    double least_step(const Mode& mode, std::int64_t size) const;
    /// The bytes of optimizer state that the trials of micro-batches did not have, but a run will.
    std::int64_t later_state() const;
    /// None where too little is known.
    std::optional<PhasePeaks> predict(const Mode& mode, std::int64_t size) const;
    bool predicted_to_fit(const Mode& mode, std::int64_t size) const;
    /// Was tried, and does.
    bool fits(const Mode& mode, std::int64_t size) const;
    bool any_fits() const;
    /// Of the optimizer's steps: no plan needs less. 0 before they were tried.
    std::int64_t update_peak() const;
    /// The smallest peak that was measured; int64's largest if none was.
    std::int64_t least_peak() const;
    /// Of the cut ones; 0 if none does.
    std::int64_t largest_that_fits(const Mode& mode) const;
    /// The smallest size that cuts the batch into as many micro-batches as this one: as fast, in less memory.
    std::int64_t evened(std::int64_t size) const;
    /// The rows of the report: what was tried, the smallest and its doubles up to the first that does not fit, the
    /// fewest micro-batches that do, the whole batch.
    std::set<std::int64_t> sizes(const Mode& mode) const;
    Candidate candidate(const Mode& mode, std::int64_t size) const;
};

}  // namespace microbatch
