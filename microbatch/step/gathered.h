#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "microbatch/core/batch_plan.h"
#include "microbatch/core/noise_scale.h"
#include "microbatch/optim/gradient_view.h"
#include "microbatch/state/state_dict.h"

namespace microbatch {

/// The loss and the weight of each grain of a batch, in order: what is added up in that order has the same bits for any
/// number of processes.
struct GrainLosses {
    std::vector<double> losses = {}, weights = {};
};

/// A batch after all its gradients are summed and before anything is updated.
struct Gathered {
    double loss_sum = 0.0;       ///< sum of the loss over the batch
    double weight = 0.0;         ///< W, what the loss is averaged over
    double gradient_norm = 0.0;  ///< Euclidean norm of the mean gradient, before clipping; 0 if W is 0
    std::int64_t micro_batches = 0;
    NoiseSums parts = {};                    ///< of the micro-batches with weight, if they were measured
    GradientViews sums = {};                 ///< gradients of the summed loss, for the parameters that have one
    std::optional<GrainLosses> grains = {};  ///< if the batch was gathered grain by grain: see Invariance
    Plan plan = {};  ///< with which it was run; the smallest, if samples of some shapes needed a smaller one

    /// Mean loss of the batch; 0 if the weight is 0.
    double loss() const { return weight > 0.0 ? loss_sum / weight : 0.0; }
};

/// A batch that was interrupted between two of its micro-batches, to be resumed here or on an identically configured
/// accumulator.
struct PartialBatch {
    Gathered so_far = {};           ///< without the gradient norm
    std::int64_t samples = 0;       ///< how many samples of the batch are included
    std::uint32_t fingerprint = 0;  ///< identifies the batch: see BatchSource
    Plan plan = {};
    bool measure_noise = false;
    std::int64_t out_of_memory = 0;  ///< attempts so far that ran out of memory
    StateDict before = {};           ///< the model's forward_state() before the batch
    StateDict batch_norm = {};       ///< the statistics so far: see BatchNormLayers::save()
};

}  // namespace microbatch
