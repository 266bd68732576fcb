#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "microbatch/core/batch_plan.h"

namespace microbatch {

/// Peak bytes in each phase of a run; 0 for a phase that it does not have.
struct PhasePeaks {
    std::int64_t first_micro_batch = 0;    ///< of a batch: finds no gradients, makes them
    std::int64_t later_micro_batches = 0;  ///< find gradients and add to them
    std::int64_t first_update = 0;         ///< makes the optimizer's state
    std::int64_t later_updates = 0;

    std::int64_t largest() const;
    bool operator==(const PhasePeaks&) const = default;
};

/// What a run's memory is made of, in bytes.
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
    std::optional<PhasePeaks> predicted = {};  ///< before it was measured; none where too little was known
    std::optional<PhasePeaks> measured = {};
    double step_seconds = 0.0;   ///< of the whole batch, measured or predicted; 0 where nothing is known
    bool time_measured = false;  ///< of a micro-batch of this very plan
    bool fits = false;           ///< within the budget

    /// The measured peak, or else the predicted one; 0 where nothing is known.
    std::int64_t peak_bytes() const;
};

/// What was found, and what was decided.
struct PlanReport {
    std::int64_t batch = 0;
    std::int64_t budget_bytes = 0;
    std::vector<Candidate> candidates = {};  ///< without recompute first, smallest micro-batch first
    std::optional<std::size_t> chosen = {};  ///< none: nothing fits
    bool given = false;                      ///< the micro-batch was asked for: no other one was looked at
    std::string why = {};                    ///< one line: why the chosen one, or why none
    MemoryParts fixed = {};                  ///< what is there whatever the micro-batch; activations 0
    double worst_relative_error = 0.0;       ///< largest |predicted - measured| / measured of the peaks
    bool affine = true;                      ///< false: the model allocates in another way from one size to the next
    double update_seconds = 0.0;             ///< one optimizer step, clipping included
    double spent_seconds = 0.0;              ///< what all measuring took

    /// The chosen candidate. Errors: ErrorKind::does_not_fit, saying what is missing and what would help, if nothing
    /// fits.
    const Candidate& choice() const;
};

/// The parts of a candidate's peak. Errors: ErrorKind::usage if nothing is known of it.
MemoryParts parts_of(const PlanReport& report, const Candidate& candidate);

/// The candidate of the smallest known peak, or none. One that did not fit although its prediction does is not known.
const Candidate* smallest(const PlanReport& report);

/// Why the chosen plan, or that nothing fits; one line. `given`: the micro-batch was asked for; `forced`: so was
/// recompute.
std::string explain_choice(const PlanReport& report, bool given, bool forced);

/// Where nothing fits: the smallest peak there is, what it is made of, and what would help. Several lines.
std::string explain_misfit(const PlanReport& report);

}  // namespace microbatch
