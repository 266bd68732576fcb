#include "microbatch/run/run_memory.h"

#include <algorithm>

#include "microbatch/memory/machine.h"

namespace microbatch {
namespace {

// A prediction is logged only with steps of the same plan, and the predicted time only with full batches.
StepMeasures measures_of(const PlanReport& report, const TrainerReport& step, std::int64_t beside_bytes) {
    StepMeasures measures;
    const Candidate& chosen = report.choice();
    if (step.step.plan != chosen.plan) return measures;
    measures.predicted_peak_bytes = predicted_peak(
        report, chosen,
        {.copy_bytes = beside_bytes, .noise = step.step.noise.has_value(), .first_step = step.progress.steps == 1});
    if (step.samples == report.batch) measures.predicted_step_seconds = chosen.step_seconds;
    return measures;
}

}  // namespace

std::int64_t predicted_peak(const PlanReport& report, const Candidate& plan, const Beside& beside) {
    const PhasePeaks& peaks = *plan.measured;
    std::int64_t peak = peaks.largest();
    if (beside.noise) {
        const std::int64_t state = beside.first_step ? report.fixed.optimizer_state : 0;
        peak = std::max(peak, peaks.later_micro_batches - state + report.fixed.gradients);
    }
    return peak + beside.copy_bytes;
}

std::int64_t missing_for_noise(const PlanReport& report) {
    return predicted_peak(report, report.choice(), {.noise = true}) - report.budget_bytes;
}

Plan plan_with_noise(const PlanReport& report) {
    const Candidate* best = nullptr;
    for (const Candidate& one : report.candidates) {
        if (!one.fits || !one.measured || one.micro_batches < 2) continue;
        if (predicted_peak(report, one, {.noise = true}) > report.budget_bytes) continue;
        if (best == nullptr || one.step_seconds < best->step_seconds) best = &one;
    }
    if (best != nullptr) return best->plan;
    const Plan& chosen = report.choice().plan;
    return {.micro_batch = std::max<std::int64_t>(1, std::min(chosen.micro_batch, report.batch / 4)),
            .recompute = chosen.recompute,
            .batch_norm = chosen.batch_norm};
}

// The model's buffers are small in comparison.
std::int64_t snapshot_bytes_of(const PlanReport& report) {
    return 2 * (report.fixed.parameters + report.fixed.optimizer_state);
}

void fit_to_plan(RunOptions& options, const PlanReport& report, at::Device device) {
    const Candidate& chosen = report.choice();
    if (chosen.micro_batches < 2 || missing_for_noise(report) > 0) options.trainer.noise_every = 0;
    const bool on_host = !device.is_cpu();
    const std::int64_t room =
        on_host ? available_memory_bytes() / 2
                : report.budget_bytes - predicted_peak(report, chosen, {.noise = options.trainer.noise_every > 0});
    std::int64_t& copy_bytes = options.checkpoints.store.memory_bytes;  // a copy to write from
    copy_bytes = std::max<std::int64_t>(0, room);
    if (options.trainer.recovery) {
        options.trainer.recovery->memory_bytes = room;
        if (const std::int64_t snapshots = snapshot_bytes_of(report); snapshots <= room) copy_bytes = room - snapshots;
    }
    options.measures = [report, on_host](const TrainerReport& step, std::int64_t copy) {
        return measures_of(report, step, on_host ? 0 : step.snapshot_bytes + copy);
    };
    options.state_bytes = report.fixed.parameters + report.fixed.optimizer_state;
    options.planned_batch = report.batch;
    options.plan = chosen.plan;
}

}  // namespace microbatch
