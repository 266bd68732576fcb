#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

#include "cli/commands/job.h"
#include "cli/options/settings.h"

namespace microbatch::cli {

/// A run as it was resolved.
struct RunConfig {
    Settings settings;
    std::string model;
    std::int64_t tokens_per_sample = 1;
    Plan cut;
    Interval length;
    std::int64_t budget_bytes = 0;
};

RunConfig config_of(const JobPlan& plan, const Plan& cut, Interval length, std::int64_t budget_bytes);

/// What config.toml holds: `--config` with it gives the same run again.
std::string config_text(const RunConfig& config);

/// Writes config.toml. Errors: ErrorKind::usage if it cannot be written.
void write_config(const std::filesystem::path& folder, const RunConfig& config);

}  // namespace microbatch::cli
