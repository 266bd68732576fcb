#pragma once

#include <cstdint>
#include <string>

#include "cli/options/settings.h"
#include "microbatch/run/run_checkpoints.h"

namespace microbatch::cli {

/// What the options of checkpoints say; a copy to write from may take so much.
RunCheckpointOptions checkpoint_options_of(const Settings& settings, std::int64_t memory_bytes);

/// "every 100 steps, the newest 3 stay".
std::string describe_checkpoints(const Settings& settings);

/// Throws ErrorKind::usage for options of checkpoints that cannot be read or contradict each other.
void validate_checkpoints(const Settings& settings);

}  // namespace microbatch::cli
