#include "cli/choose_plan.h"

#include <fmt/format.h>

#include "microbatch/core/batch_plan.h"
#include "microbatch/core/units.h"

namespace microbatch::cli {
namespace {

std::string explain(const Probe& probe, std::int64_t batch) {
    const Candidate& chosen = probe.candidates[probe.chosen];
    if (chosen.micro_batch == batch) return "the whole batch fits and nothing is faster: no accumulation needed";
    const Candidate& native = probe.candidates.back();
    if (native.fits) return "the fastest measured; the whole batch would fit, too, but is not faster";
    return fmt::format("the fastest measured that fits; the whole batch would need {}",
                       format_bytes(native.measured ? native.measured->peak_bytes : native.predicted_peak_bytes));
}

}  // namespace

ChosenPlan choose_plan(const JobPlan& plan, std::int64_t budget_bytes) {
    require_room_for_samples(plan, budget_bytes);
    if (const auto given = micro_batch_of(plan.settings)) {
        return {*given, measure_micro_batch(plan, *given, budget_bytes).peak_bytes, "as given"};
    }
    const Probe probe = probe_job(plan, budget_bytes);
    const Candidate& chosen = probe.candidates[probe.chosen];
    return {chosen.micro_batch, chosen.measured->peak_bytes, explain(probe, plan.batch)};
}

}  // namespace microbatch::cli
