#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "microbatch/core/batch_plan.h"

namespace microbatch {

/// Peak bytes in each phase of a run; 0 for a phase that the run does not have.
struct PhasePeaks {
    std::int64_t first_micro_batch = 0;    ///< of a batch: creates the gradients
    std::int64_t later_micro_batches = 0;  ///< of a batch: add to the gradients
    std::int64_t first_update = 0;         ///< creates the optimizer's state
    std::int64_t later_updates = 0;

    std::int64_t largest() const;
    bool operator==(const PhasePeaks&) const = default;
};

/// The parts of a run's memory, in bytes.
struct MemoryParts {
    std::int64_t parameters = 0;
    std::int64_t gradients = 0;
    std::int64_t optimizer_state = 0;
    std::int64_t other = 0;        ///< the batch itself, buffers, whatever else the process holds
    std::int64_t activations = 0;  ///< activations and temporaries at the peak, with the gradients being made if it is
                                   ///< in the first micro-batch

    std::int64_t total() const { return parameters + gradients + optimizer_state + other + activations; }
    bool operator==(const MemoryParts&) const = default;
};

/// One way to run the batch.
struct Candidate {
    Plan plan;
    std::int64_t micro_batches = 0;
    std::optional<PhasePeaks> predicted = {};  ///< before it was measured; nullopt where too little was known
    std::optional<PhasePeaks> measured = {};
    double step_seconds = 0.0;   ///< of the whole batch, measured or predicted; 0 if unknown
    bool time_measured = false;  ///< whether this very plan was timed
    bool fits = false;           ///< within the budget

    /// The measured peak, or else the predicted one; 0 if unknown.
    std::int64_t peak_bytes() const;
};

/// All candidates, and the decision.
struct PlanReport {
    std::int64_t batch = 0;
    std::int64_t budget_bytes = 0;
    std::vector<Candidate> candidates = {};  ///< without recompute first, smallest micro-batch first
    std::optional<std::size_t> chosen = {};  ///< none: nothing fits
    bool given = false;                      ///< the micro-batch was given: no other was considered
    std::string why = {};                    ///< one line: why the chosen one, or why none
    std::string batch_norm = {};             ///< one line: what BatchNorm layers do, and why; empty without such layers
    MemoryParts fixed = {};                  ///< what does not depend on the micro-batch; activations 0
    double worst_relative_error = 0.0;       ///< largest |predicted - measured| / measured of the peaks
    bool affine = true;                      ///< false: the model allocates differently at different sizes
    double update_seconds = 0.0;             ///< one optimizer step, clipping and communication included
    double spent_seconds = 0.0;              ///< spent on all trials

    /// The chosen candidate. Errors: ErrorKind::does_not_fit if nothing fits, saying how much is missing and what would
    /// help.
    const Candidate& choice() const;
};

/// The parts of a candidate's peak. Errors: ErrorKind::usage if its peak is unknown.
MemoryParts parts_of(const PlanReport& report, const Candidate& candidate);

/// The candidate with the smallest known peak, or nullptr. The peak of one that did not fit although its prediction
/// does is unknown.
const Candidate* smallest(const PlanReport& report);

/// Why the plan was chosen, or that nothing fits; one line. `given`: the user set the micro-batch; `forced`: the user
/// set recompute.
std::string explain_choice(const PlanReport& report, bool given, bool forced);

/// For when nothing fits: the smallest peak, its parts, and what would help. Several lines.
std::string explain_misfit(const PlanReport& report);

}  // namespace microbatch
