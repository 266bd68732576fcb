#include "cli/commands/plan_job.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>

#include "cli/commands/interrupt.h"
#include "cli/print/output.h"
#include "microbatch/core/error.h"
#include "microbatch/core/units.h"
#include "microbatch/memory/budget_allocator.h"
#include "microbatch/memory/machine.h"

namespace microbatch::cli {
namespace {

// Shows each trial: on a terminal, one line that is redrawn; in a pipe, an occasional line.
class TrialLine {
public:
    explicit TrialLine(std::FILE* stream) : stream_(stream), terminal_(is_terminal(stream)) {}
    TrialLine(const TrialLine&) = delete;
    TrialLine& operator=(const TrialLine&) = delete;
    ~TrialLine() {
        if (terminal_ && drawn_) print(stream_, "\r\x1b[K");
    }

    void show(const Plan& plan) {
        const std::string text =
            fmt::format("measuring a micro-batch of {}{}", plan.micro_batch, plan.recompute ? " with recompute" : "");
        const auto now = std::chrono::steady_clock::now();
        if (terminal_) {
            print(stream_, "\r{}\x1b[K", text.substr(0, terminal_columns(stream_) - 1));
            drawn_ = true;
        } else if (now - last_ > std::chrono::seconds(5)) {
            print(stream_, "{}\n", text);
            last_ = now;
        }
    }

private:
    std::FILE* stream_;
    bool terminal_;
    bool drawn_ = false;
    std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

Recompute recompute_of(const JobPlan& plan, const Job& job) {
    if (plan.settings.recompute == "never") return Recompute::never;
    if (plan.settings.recompute == "auto") return Recompute::automatic;
    if (job.accumulator->model().offers_checkpointing()) return Recompute::always;
    throw Error(ErrorKind::usage,
                fmt::format("--recompute always: {} has no blocks to recompute; gpt and resnet do", plan.model));
}

// The memory available for measuring a job that does not fit.
std::int64_t most_bytes(std::int64_t budget_bytes) {
    return std::max(budget_bytes, available_memory_bytes() / 10 * 9);
}

// No plan helps if even the sample numbers of the batch do not fit.
void require_room_for_numbers(std::int64_t batch, std::int64_t budget_bytes) {
    constexpr std::int64_t bytes_a_sample = 2 * sizeof(std::int64_t);
    constexpr std::int64_t little = std::int64_t{1} << 20;
    if (batch <= std::max(budget_bytes, little) / bytes_a_sample) return;
    throw Error(ErrorKind::does_not_fit,
                fmt::format("--batch {}: the list of its sample numbers alone exceeds the memory budget of {}; use a "
                            "smaller --batch or raise --memory",
                            batch, format_bytes(budget_bytes)));
}

PlanReport make_report(const JobPlan& plan, const Job& job, const PlannerOptions& options) {
    require_room_for_numbers(plan.batch, options.budget_bytes);
    const Dataset& data = *plan.data.train;
    const PlanReport report = plan_batch(*job.accumulator, DatasetBatch::longest(data, plan.batch), job.loss, options);
    if (interrupted()) throw Interrupted();
    return report;
}

}  // namespace

Job make_job_to_plan(const JobPlan& plan, std::int64_t budget_bytes) {
    const BudgetScope allowed(most_bytes(budget_bytes));
    return make_job(plan);
}

void require_whole_batch(const JobPlan& plan) {
    if (plan.batch >= plan.settings.batch) return;
    throw Error(ErrorKind::usage,
                fmt::format("a batch of {} is larger than the whole run of {} samples, which would be a single batch "
                            "of {}; use a smaller batch or a longer run (--samples)",
                            plan.settings.batch, plan.batch, plan.batch));
}

PlanReport plan_job(const JobPlan& plan, const Job& job, std::int64_t budget_bytes, std::FILE* progress,
                    bool whole_table) {
    PlannerOptions options{.budget_bytes = budget_bytes,
                           .steps = plan.steps,
                           .recompute = recompute_of(plan, job),
                           .micro_batch = plan.settings.micro_batch,
                           .most_bytes = most_bytes(budget_bytes),
                           .whole_table = whole_table};
    if (options.micro_batch) options.micro_batch = std::min(*options.micro_batch, plan.batch);
    TrialLine line(progress);
    options.on_trial = [&line](const Plan& trial) {
        if (interrupted()) throw Interrupted();
        line.show(trial);
    };
    PlanReport report = make_report(plan, job, options);
    // One micro-batch for the whole run: a smaller batch would need a different split.
    const std::int64_t smallest = std::min(smallest_batch(plan.batches), plan.batch);
    if (!report.chosen || report.choice().plan.micro_batch <= smallest) return report;
    options.micro_batch = smallest;
    report = make_report(plan, job, options);
    if (report.chosen) report.why = "as large as the smallest batch of the schedule";
    return report;
}

PlanReport plan_native(const JobPlan& plan, const Job& job, std::int64_t budget_bytes) {
    return make_report(plan, job,
                       {.budget_bytes = budget_bytes,
                        .recompute = Recompute::never,
                        .most_steps = 0.0,
                        .least_seconds = 0.0,
                        .on_trial = {}});
}

std::string describe_cut(const Candidate& candidate) {
    const std::string cut =
        candidate.micro_batches == 1
            ? "in one piece"
            : fmt::format("in {} micro-batches of {}", candidate.micro_batches, candidate.plan.micro_batch);
    return cut + (candidate.plan.recompute ? ", with recompute" : "");
}

}  // namespace microbatch::cli
