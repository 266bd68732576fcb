#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "microbatch/core/learning_rate.h"
#include "microbatch/data/dataset.h"
#include "microbatch/step/accumulator.h"

namespace microbatch {

struct BranchOptions {
    std::int64_t batch = 64;                           ///< the base batch
    std::vector<std::int64_t> factors = {1, 2, 4, 8};  ///< multiples of the batch, increasing from 1
    std::int64_t samples = 4096;                       ///< for each branch, the same ones
    RateRule rule = RateRule::sqrt;                    ///< how the rate is scaled with the batch: none, linear or sqrt
    std::uint64_t seed = 0;                            ///< for the order of the samples
    double tolerance = 0.01;                           ///< how much higher a loss still counts as good
    std::function<void(std::int64_t batch)> on_step =
        {};  ///< called before each step: report progress, or throw to stop
};

/// The result of one branch.
struct Branch {
    std::int64_t batch = 0;
    double learning_rate = 0.0;
    double loss = 0.0;  ///< mean over the last quarter of its samples
    bool as_good = false;
};

/// Trains a branch at every multiple of the batch, each from the current state of the job, which is restored after
/// each.
///
/// Formula:  a branch is as good if its loss is at most the base's + tolerance. The critical batch is the largest batch
///           for which this holds, and for all smaller ones.
/// Source:   Merrill et al. 2025, arXiv:2505.23971, section 3. Deviation: smoothed by the mean of the last quarter.
/// State:    parameters, buffers, optimizer and its rate are unchanged, even after an exception; the generators are not
///           restored. Memory: a copy of parameters and optimizer state.
/// Errors:   ErrorKind::usage if the factors do not increase from 1, samples is below the largest batch, or as Trainer.
/// Cost:     factors.size() * samples.
std::vector<Branch> branch_by_batch(Accumulator& accumulator, const Dataset& dataset, const LossFunction& loss,
                                    const BranchOptions& options);

}  // namespace microbatch
