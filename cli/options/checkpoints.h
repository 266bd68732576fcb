#pragma once

#include <cstdint>
#include <string>

#include "cli/options/settings.h"
#include "microbatch/run/run_checkpoints.h"

namespace microbatch::cli {

/// The checkpoint options as library options; a checkpoint's copy may take at most this many bytes.
RunCheckpointOptions checkpoint_options_of(const Settings& settings, std::int64_t memory_bytes);

/// "every 100 steps, keeping the newest 3".
std::string describe_checkpoints(const Settings& settings);

/// Throws ErrorKind::usage for checkpoint options that cannot be parsed or contradict each other.
void validate_checkpoints(const Settings& settings);

}  // namespace microbatch::cli
