#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "microbatch/core/noise_scale.h"
#include "microbatch/core/spike_guard.h"
#include "microbatch/core/units.h"
#include "microbatch/data/sampler.h"
#include "microbatch/state/stored_tensor.h"
#include "microbatch/step/accumulator.h"

namespace microbatch {

/// What a run goes back to when it diverges: see Recovery.
struct RecoveryState {
    struct Point {
        std::int64_t steps = 0;
        SpikeGuardState guard = {};
        StoredTensors tensors = {};  ///< as RunPoint's
        std::vector<std::size_t> state_counts = {};
        bool in_file = false;  ///< its tensors are read anew each time; not written down
    };

    static constexpr std::size_t most_points = 2;

    std::vector<Point> points = {};  ///< oldest first
    std::int64_t times = 0;
    std::int64_t gone_back_at = 0;
    bool in_files = false;  ///< memory was given up
    bool failed = false;    ///< no more are taken
};

/// A batch that was left between two of its micro-batches: see OpenBatch.
struct OpenBatchState {
    std::int64_t samples = 0;
    Gathered so_far = {};
    bool measure_parts = false;
    Plan plan = {};
    std::int64_t out_of_memory = 0;
    double seconds = 0.0;           ///< that it has taken so far
    StoredTensors gradients = {};   ///< those that there are, by the parameters' names
    StoredTensors buffers = {};     ///< of the model, before the batch
    StoredTensors generators = {};  ///< before the batch
};

/// All that a run goes on from: with it another process makes the same steps, bit for bit. A value, but for the
/// tensors, which are the trainer's own until own_tensors(): the next step changes them.
struct TrainerState {
    Progress progress = {};
    SamplerState sampler = {};      ///< before the batch that is open
    std::int64_t dataset_size = 0;  ///< samples that the sampler's position is in
    double learning_rate = 0.0;     ///< the optimizer's
    double own_rate = 0.0;          ///< without a schedule: before the run first went back
    std::int64_t last_batch = 0;    ///< the full batch of the last step
    std::int64_t shrunk_at = 0;     ///< after so many steps it became smaller, the last time
    std::optional<SpikeGuardState> guard = {};
    NoiseAverage::State noise = {};
    std::optional<RecoveryState> recovery = {};
    std::vector<MicroBatchCap> limits = {};
    std::optional<OpenBatchState> open = {};

    StoredTensors parameters = {};                   ///< by name
    StoredTensors buffers = {};                      ///< of the model, by name
    std::vector<std::size_t> optimizer_counts = {};  ///< state tensors of each of the optimizer's parameters
    StoredTensors optimizer = {};                    ///< one parameter's after the other: "NAME.0", "NAME.1", ...
    StoredTensors generators = {};                   ///< the CPU's, then those of the parameters' devices
};

/// A list for each of the counts, of so many tensors one after the other, each had by `get`.
/// Errors: ErrorKind::bad_data if there are fewer or more tensors than the counts say, and what `get` throws.
OptimizerState lists_of(const std::vector<std::size_t>& counts, const StoredTensors& tensors,
                        const std::function<at::Tensor(const StoredTensor&)>& get);

/// Bytes that own_tensors() would take: all but the snapshots, which no step changes.
std::int64_t bytes_to_own(const TrainerState& state);

/// Replaces tensors that the next step would change by copies.
/// Errors: c10::OutOfMemoryError if there is no room; the state is as before then.
void own_tensors(TrainerState& state);

/// Makes the state that of before the open batch, if there is one.
void drop_open_batch(TrainerState& state);

}  // namespace microbatch
