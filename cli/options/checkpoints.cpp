#include "cli/options/checkpoints.h"

#include <fmt/format.h>

#include <algorithm>

#include "cli/options/refuse.h"
#include "microbatch/core/units.h"

namespace microbatch::cli {
namespace {

Interval every_of(const Settings& settings) {
    return read_flag("--checkpoint-every", [&] { return parse_interval(settings.checkpoint_every); });
}

std::optional<Interval> keep_every_of(const Settings& settings) {
    if (settings.keep_every.empty()) return std::nullopt;
    const Interval every = read_flag("--keep-every", [&] { return parse_interval(settings.keep_every); });
    if (every.count < 1) refuse(fmt::format("--keep-every {}: must be above 0", settings.keep_every));
    return every;
}

}  // namespace

RunCheckpointOptions checkpoint_options_of(const Settings& settings, std::int64_t memory_bytes) {
    return {.enabled = !settings.no_checkpoints,
            .every = every_of(settings),
            .store = {.keep = settings.keep,
                      .keep_every = keep_every_of(settings),
                      .memory_bytes = std::max<std::int64_t>(0, memory_bytes)}};
}

std::string describe_checkpoints(const Settings& settings) {
    if (settings.no_checkpoints) return "never: a killed run cannot be resumed";
    const Interval every = every_of(settings);
    const std::string stay =
        settings.keep_every.empty() ? std::string() : fmt::format(", and one every {}", settings.keep_every);
    return fmt::format("{}, keeping the newest {}{}",
                       every.count == 0 ? "at the end and on interrupt" : "every " + to_string(every), settings.keep,
                       stay);
}

void validate_checkpoints(const Settings& settings) {
    every_of(settings);
    keep_every_of(settings);
    if (settings.no_checkpoints && settings.resume) {
        refuse("--no-checkpoints contradicts --resume, which resumes from a checkpoint");
    }
}

}  // namespace microbatch::cli
