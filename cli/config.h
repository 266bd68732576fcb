#pragma once

#include <CLI/App.hpp>
#include <cstdint>
#include <filesystem>

#include "cli/job.h"
#include "cli/settings.h"

namespace microbatch::cli {

/// Fills what the flags left open from the TOML file that --config names: flags win. A key is a flag's name; keys that
/// only another command knows are left to it.
/// Errors: ErrorKind::usage if the file cannot be read or parsed, or a key is no flag of any command: the message names
///         the nearest one that is.
void apply_config(CLI::App& command, const Settings& settings);

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

/// Writes config.toml. `--config` with it gives the same run again.
/// Errors: ErrorKind::usage if the file cannot be written.
void write_config(const std::filesystem::path& folder, const RunConfig& config);

}  // namespace microbatch::cli
