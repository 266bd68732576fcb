#pragma once

#include "microbatch/core/planner.h"
#include "microbatch/step/accumulator.h"

namespace microbatch {

/// Finds the fastest plan for batches like this one on the job as it is, within the budget, and leaves no trace:
/// parameters, gradients, optimizer state, the model's buffers and the generators are bit for bit as before. The
/// accumulator's plan is not changed; give the result to set_plan().
///
///     const DatasetBatch batch = DatasetBatch::longest(dataset, 64);
///     const PlanReport report = plan_batch(accumulator, batch, loss, {.budget_bytes = 2 << 30});
///     accumulator.set_plan(report.choice().plan);
///
/// The loss function is called with slices of the batch, in training as it stands; a loss of NaN is planned like any
/// other. On the CPU the budget is enforced while it is tried (install_budget_allocator() is called); elsewhere what
/// the device says is compared with it. Without state in the optimizer its first step is rehearsed; with state, only a
/// later one, where there is room for a second state.
///
/// options: batch and offers_recompute are filled in here; budget_bytes 0 means the budget as it is set.
/// Errors:  as make_plan(); whatever the loss function throws, the job as before. Nothing fits: no error, the report
/// has
///          none chosen.
/// Threads: none may use the job meanwhile.
/// Cost:    see make_plan().
PlanReport plan_batch(Accumulator& accumulator, const BatchSource& batch, const LossFunction& loss,
                      PlannerOptions options);
inline PlanReport plan_batch(Accumulator& accumulator, const Batch& batch, const LossFunction& loss,
                             PlannerOptions options) {
    return plan_batch(accumulator, TensorBatch(batch), loss, options);
}

}  // namespace microbatch
