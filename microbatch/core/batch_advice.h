#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "microbatch/core/plan_report.h"

namespace microbatch {

/// The speed of a micro-batch size, and so of a batch split into it.
struct TimedCut {
    std::int64_t micro_batch = 1;
    double sample_seconds = 0.0;  ///< forward and backward of one sample
};

/// The speed of every micro-batch size that was timed for the plan.
std::vector<TimedCut> timed_cuts(const PlanReport& report);

/// Up to which batch to compare: where a larger one saves no more steps, at most 2^20, or `batch` if that is larger.
std::int64_t largest_to_compare(double noise_batch, std::int64_t batch);

/// The cost of a batch size, from the noise of the gradient and the speed of the machine.
struct BatchCost {
    std::int64_t batch = 1;
    std::int64_t micro_batch = 1;  ///< the fastest that is at most the batch
    double step_seconds = 0.0;
    double steps = 0.0;    ///< to the same loss, relative to the fewest that any batch needs
    double samples = 0.0;  ///< samples, likewise
    double time = 0.0;     ///< to the same loss, relative to the fastest batch

    bool is_cut() const { return micro_batch < batch; }
};

/// Batch sizes side by side, and conclusions.
struct BatchAdvice {
    double noise_batch = 0.0;      ///< the knee: twice the minimum of steps and twice the minimum of samples
    std::int64_t samples = 0;      ///< of the data; no batch of the table is larger
    std::vector<BatchCost> table;  ///< each batch twice the previous one
    std::size_t soonest = 0;       ///< index in the table: reaches the same loss first on this machine
    BatchCost soonest_uncut = {};  ///< of those timed as one micro-batch, in the table or not

    /// True if the fastest batch is accumulated and reaches the loss at least 5 % sooner than any that is not.
    bool accumulation_pays() const;
};

/// The smallest batch that takes at most a tenth more steps than the minimum; the largest that takes at most a tenth
/// more samples than the minimum, or 1.
std::int64_t batch_of_few_steps(double noise_batch);
std::int64_t batch_of_few_samples(double noise_batch);

/// How often a batch contains a sample: "a batch of 64 holds each of the data's 9 samples 7.1 times". Empty if the
/// batch is not larger than the data.
std::string describe_repetition(std::int64_t batch, std::int64_t samples);

/// Throws ErrorKind::usage, saying how many samples are needed, if a batch is more than a tenth of the data. Its
/// micro-batches would share so many samples with the next batch that their noise is not that of new samples.
void require_enough_data(std::int64_t batch, std::int64_t samples);

/// Compares batches from the smallest timed micro-batch to `largest`, doubling, but none larger than the data's
/// `samples`.
///
/// Formula:  steps S / S_min = 1 + B_noise / B, samples E / E_min = 1 + B / B_noise, time = S (samples * time of one +
///           optimizer's step).
/// Source:   McCandlish et al. 2018, arXiv:1812.06162, equation 2.11, with the noise scale for the critical batch: a
///           proxy, which is too small for language models (Merrill et al. 2025, arXiv:2505.23971).
/// Units:    samples, seconds.
/// Errors:   ErrorKind::usage unless noise_batch is finite and above 0, and a timed micro-batch has at most `largest`
///           samples and no more than the data has.
BatchAdvice advise_batch(double noise_batch, std::span<const TimedCut> cuts, double update_seconds,
                         std::int64_t largest, std::int64_t samples);

}  // namespace microbatch
