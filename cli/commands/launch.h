#pragma once

#include "cli/options/settings.h"

namespace microbatch::cli {

/// True if --processes is above 1 and this process is not one of those that were started for it.
bool is_launcher(const Settings& settings);

/// Starts this program --processes times, each as a rank, and waits for all; returns the exit code of the run. The first
/// has the terminal; of the others, the error messages are shown. A signal of this process is passed on to all. When one has
/// failed, the others have 9 seconds to end, and the first, which writes a checkpoint, 5 minutes.
int launch(const Settings& settings);

}  // namespace microbatch::cli
