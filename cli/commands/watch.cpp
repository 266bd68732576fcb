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

Watch watch_of(const JobPlan& plan, const PlanReport& report, const std::filesystem::path& folder) {
    const Settings& settings = plan.settings;
    const std::int64_t noise_every = settings.invariant ? 0 : settings.noise_every;  // a grain's gradient is not kept
    Watch watch{.options = {.trainer = {.noise_every = noise_every}, .checkpoints = checkpoint_options_of(settings)}};
    TrainerOptions& trainer = watch.options.trainer;
    if (!settings.no_guard) trainer.guard = SpikeGuardOptions{.most_refused = most_refused_in_a_row - 1};
    if (trainer.guard && settings.restores > 0) {
        trainer.recovery = RecoveryOptions{.most = settings.restores, .folder = folder};
    }
    fit_to_plan(watch.options, report, device_of(settings));
    watch.saved_line = describe_checkpoints(settings, watch.options.checkpoints.every);
    watch.noise_line = describe_noise(noise_every, missing_for_noise(report), report.choice().micro_batches > 1);
    watch.guard_line = "off: only non-finite steps are refused";
    if (trainer.guard) {
        watch.guard_line = fmt::format("{:g} spreads above the median of the last {} steps", trainer.guard->sigmas,
                                       trainer.guard->window);
    }
    if (trainer.recovery) watch.guard_line += "; " + describe_recovery(*trainer.recovery, snapshot_bytes_of(report));
    return watch;
}

}  // namespace microbatch::cli
