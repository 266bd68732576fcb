#include "cli/commands/watch.h"

#include <fmt/format.h>

#include <algorithm>

#include "cli/options/refuse.h"
#include "microbatch/core/units.h"
#include "microbatch/run/outcome.h"

namespace microbatch::cli {
namespace {

std::string describe_noise(std::int64_t every, std::int64_t missing, bool cut) {
    if (every == 0) return "not measured";
    if (!cut) return "not measured: the batch is one micro-batch, and noise needs two";
    if (missing > 0) {
        return fmt::format("not measured: a copy of the gradients needs {} more memory", format_bytes(missing));
    }
    return fmt::format("measured every {} steps", every);
}

// Two snapshots of the memory in the plan; the model's buffers are small in comparison.
std::int64_t snapshot_bytes_of(const PlanReport& report) {
    return 2 * (report.fixed.parameters + report.fixed.optimizer_state);
}

std::string describe_recovery(const RecoveryOptions& recovery, std::int64_t bytes) {
    return fmt::format("at most {} roll-backs, snapshots {}", recovery.most,
                       bytes <= recovery.memory_bytes ? fmt::format("in memory ({})", format_bytes(bytes)) : "on disk");
}

std::string describe_checkpoints(const Settings& settings, const Interval& every) {
    if (settings.no_checkpoints) return "never: a killed run cannot be resumed";
    return fmt::format("{}, keeping the newest {}{}",
                       every.count == 0 ? "at the end and on interrupt" : "every " + to_string(every), settings.keep,
                       settings.keep_every.empty() ? "" : fmt::format(", and one every {}", settings.keep_every));
}

}  // namespace

RunCheckpointOptions checkpoint_options_of(const Settings& settings) {
    RunCheckpointOptions options{.enabled = !settings.no_checkpoints, .store = {.keep = settings.keep}};
    options.every = read_flag("--checkpoint-every", [&] { return parse_interval(settings.checkpoint_every); });
    if (!settings.keep_every.empty()) {
        options.store.keep_every = read_flag("--keep-every", [&] { return parse_interval(settings.keep_every); });
        if (options.store.keep_every->count < 1) refuse("--keep-every {}: must be above 0", settings.keep_every);
    }
    if (settings.no_checkpoints && settings.resume) {
        refuse("--no-checkpoints contradicts --resume, which resumes from a checkpoint");
    }
    return options;
}

std::int64_t predicted_peak(const PlanReport& report, const Candidate& plan, const Beside& beside) {
    const PhasePeaks& peaks = *plan.measured;
    std::int64_t peak = peaks.largest();
    if (beside.noise) {
        const std::int64_t state = beside.first_step ? report.fixed.optimizer_state : 0;
        peak = std::max(peak, peaks.later_micro_batches - state + report.fixed.gradients);
    }
    return peak + beside.copy_bytes;
}

Watch watch_of(const JobPlan& plan, const PlanReport& report, const std::filesystem::path& folder) {
    const Settings& settings = plan.settings;
    Watch watch;
    watch.checkpoints = checkpoint_options_of(settings);
    watch.saved_line = describe_checkpoints(settings, watch.checkpoints.every);
    const std::int64_t missing = predicted_peak(report, report.choice(), {.noise = true}) - report.budget_bytes;
    const bool cut = report.choice().micro_batches > 1;
    if (cut && missing <= 0) watch.noise_every = settings.noise_every;
    watch.noise_line = describe_noise(settings.noise_every, missing, cut);
    watch.guard_line = "off: only non-finite steps are refused";
    const std::int64_t room =
        report.budget_bytes - predicted_peak(report, report.choice(), {.noise = watch.noise_every > 0});
    std::int64_t& copy_bytes = watch.checkpoints.store.memory_bytes;  // a copy to write from
    copy_bytes = std::max<std::int64_t>(0, room);
    if (settings.no_guard) return watch;
    watch.guard = SpikeGuardOptions{.most_refused = most_refused_in_a_row - 1};
    watch.guard_line =
        fmt::format("{:g} spreads above the median of the last {} steps", watch.guard->sigmas, watch.guard->window);
    if (settings.restores == 0) return watch;
    watch.recovery = RecoveryOptions{.most = settings.restores, .memory_bytes = room, .folder = folder};
    const std::int64_t snapshots = snapshot_bytes_of(report);
    watch.guard_line += "; " + describe_recovery(*watch.recovery, snapshots);
    if (snapshots <= room) copy_bytes = room - snapshots;
    return watch;
}

}  // namespace microbatch::cli
