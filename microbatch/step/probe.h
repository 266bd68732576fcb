#pragma once

#include "microbatch/core/planner.h"
#include "microbatch/step/accumulator.h"

namespace microbatch {

/// Finds the fastest plan within the budget for batches like this one, on the job as it is, without side effects:
/// parameters, gradients, optimizer state, the model's buffers and the generators are unchanged, bit for bit. Does not
/// change the accumulator's plan; pass the result to set_plan().
///
///     const DatasetBatch batch = DatasetBatch::longest(dataset, 64);
///     const PlanReport report = plan_batch(accumulator, batch, loss, {.budget_bytes = 2 << 30});
///     accumulator.set_plan(report.choice().plan);
///
/// The loss function is called with slices of the batch, in training mode as it is; a loss of NaN does not affect
/// planning. On the CPU, the budget is enforced during the trials (install_budget_allocator() is called); elsewhere,
/// the device's statistics are compared with it. If the optimizer has no state, its first step is a dry run; with
/// state, a later step is, if there is memory for a second state.
///
/// options: batch and offers_recompute are set here; a budget_bytes of 0 means the current budget.
/// Errors:  as make_plan(); whatever the loss function throws, with the job unchanged. If nothing fits, there is no
///          error, and the report has no chosen plan.
/// Threads: no other thread may use the job meanwhile.
/// Cost:    see make_plan().
PlanReport plan_batch(Accumulator& accumulator, const BatchSource& batch, const LossFunction& loss,
                      PlannerOptions options);
inline PlanReport plan_batch(Accumulator& accumulator, const Batch& batch, const LossFunction& loss,
                             PlannerOptions options) {
    return plan_batch(accumulator, TensorBatch(batch), loss, options);
}

}  // namespace microbatch
