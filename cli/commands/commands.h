#pragma once

#include <filesystem>

#include "cli/options/command_line.h"
#include "microbatch/run/report.h"

namespace microbatch::cli {

CommandSpec train_command();
CommandSpec compare_command();
CommandSpec advise_command();
CommandSpec plan_command();
CommandSpec report_command();
CommandSpec doctor_command();

/// write_run_report() with the settings in the folder's config.toml. Errors: also as read_config().
std::string write_report_of(const std::filesystem::path& folder, const RunSummary& more = {});

}  // namespace microbatch::cli
