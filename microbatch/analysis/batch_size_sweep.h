#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "microbatch/core/learning_rate.h"
#include "microbatch/data/dataset.h"
#include "microbatch/step/accumulator.h"

namespace microbatch {

struct BranchOptions {
    std::int64_t batch = 64;                               ///< of the base
    std::vector<std::int64_t> factors = {1, 2, 4, 8};      ///< of the batch, rising from 1
    std::int64_t samples = 4096;                           ///< that each branch trains on, the same ones
    RateRule rule = RateRule::sqrt;                        ///< how the rate follows the batch: none, linear or sqrt
    std::uint64_t seed = 0;                                ///< of the order of the samples
    double tolerance = 0.01;                               ///< how much more loss is as good
    std::function<void(std::int64_t batch)> on_step = {};  ///< called before each step: progress, or throw to end it
};

/// What became of one branch.
struct Branch {
    std::int64_t batch = 0;
    double learning_rate = 0.0;
    double loss = 0.0;  ///< mean over the last quarter of its samples
    bool as_good = false;
};

/// From where the job is, trains a branch at every multiple of the batch, and puts the job back after each.
///
/// Formula:  a branch is as good if its loss is at most the base's + tolerance. The largest batch of which that is so,
///           and of every smaller one, is the critical batch here and now.
/// Source:   Merrill et al. 2025, arXiv:2505.23971, section 3. Deviation: smoothed by the mean of the last quarter.
/// State:    parameters, buffers, optimizer and its rate are as before, whatever is thrown; generators go on.
///           Memory: a copy of parameters and state.
/// Errors:   ErrorKind::usage if the factors are not rising from 1, samples is below the largest batch, or as the
///           Trainer's.
/// Cost:     factors.size() * samples.
std::vector<Branch> branch_by_batch(Accumulator& accumulator, const Dataset& dataset, const LossFunction& loss,
                                    const BranchOptions& options);

}  // namespace microbatch
