#pragma once

#include "microbatch/step/accumulator.h"

#include <memory>
#include <optional>

#include "microbatch/core/planner.h"
#include "microbatch/memory/reclaim.h"
#include "python/src/bindings.h"
#include "python/src/group.h"
#include "python/src/model.h"

namespace microbatch::python {

/// Collects Python's cycles before a retry: an exception may be held by one of its frames, and holds the tensors of the
/// attempt. Nothing else is lost by it.
Reclaimer collect_garbage();

/// The library's Accumulator on a Python model and optimizer, which it owns.
class PythonAccumulator {
public:
    /// Without a driver, there is no optimizer: the caller steps with the gradients that hand_over() leaves in .grad.
    /// With a group, all ranks begin with the parameters and buffers of rank 0: see reducer_of() for `whole_batches`.
    PythonAccumulator(py::object model, py::object driver, double clip_norm, bool sum_in_product,
                      const std::shared_ptr<Group>& group, bool whole_batches, bool shard_optimizer,
                      std::int64_t grain);

    StepReport step(const py::object& source, const py::object& loss, bool measure_noise, SpikeGate* gate);
    void gather(const py::object& source, const py::object& loss, bool measure_noise);
    PlanReport plan(const py::object& source, const py::object& loss, PlannerOptions how,
                    std::optional<BatchNorm> batch_norm, const py::object& on_trial);
    void add(const py::object& sum, const py::object& weight);

    Accumulator& get() { return *accumulator_; }
    const std::shared_ptr<PythonModel>& model() const { return model_; }

private:
    std::shared_ptr<PythonModel> model_;
    std::unique_ptr<Optimizer> optimizer_;
    std::optional<Accumulator> accumulator_;
};

}  // namespace microbatch::python
