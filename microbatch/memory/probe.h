#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include "microbatch/core/memory_model.h"

namespace microbatch {

/// One micro-batch size, measured through a job's phases: first and later micro-batch, first and later step.
struct Measurement {
    std::int64_t micro_batch = 0;
    std::int64_t peak_bytes = 0;       ///< largest over the phases, parameters and all
    double micro_batch_seconds = 0.0;  ///< one later micro-batch, forward and backward
    double update_seconds = 0.0;       ///< one later optimizer step, clipping included
};

/// Measures one micro-batch size on a job of its own. A c10::OutOfMemoryError says that it does not fit; a measured
/// peak above the budget says so, too, and how much it needs.
using Measure = std::function<Measurement(std::int64_t micro_batch)>;

/// A way to cut the batch.
struct Candidate {
    std::int64_t micro_batch = 0;
    std::int64_t micro_batches = 0;
    std::int64_t predicted_peak_bytes = 0;  ///< by the memory model, before this candidate was measured
    std::optional<Measurement> measured =
        {};                     ///< none where it was predicted not to fit, or larger ones stopped paying
    double step_seconds = 0.0;  ///< of the whole batch, from the measurement; 0 without one
    bool fits = false;
};

/// What was found, smallest micro-batch first, and which one to take.
struct Probe {
    std::vector<Candidate> candidates;
    std::size_t chosen = 0;
    MemoryModel memory;  ///< fitted to all that was measured
};

/// Finds the fastest micro-batch whose peak is within the budget.
///
/// Measures 1 and 2, fits peak = F + A b, then doubles for as long as the prediction fits and the time per sample still
/// falls (by 1 % over two sizes: timings are noisy), and the largest that fits. Chosen is the smallest measured step
/// time; a tie of 2 % goes to the smaller micro-batch.
///
/// An uncut batch never holds gradients during a forward pass: it stays `uncut_saving_bytes` (those of the gradients)
/// below the line that the others are on, and can fit where a micro-batch of 1 does not.
///
/// Units:  bytes, samples, seconds.
/// Errors: ErrorKind::usage if batch < 1 or budget < 1; ErrorKind::does_not_fit if neither a micro-batch of 1 nor the
///         uncut batch fits: the message says what is missing, where it was measured. What else `measure` throws passes
///         through.
/// Cost:   four micro-batches and two optimizer steps of every size that is measured.
Probe probe_micro_batches(std::int64_t batch, std::int64_t budget_bytes, const Measure& measure,
                          std::int64_t uncut_saving_bytes = 0);

}  // namespace microbatch
