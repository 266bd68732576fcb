#pragma once

#include <string>

namespace microbatch::cli {

/// Prints what was predicted for a run against what it measured: peak memory and time per step, for each plan that it
/// used, from its metrics.jsonl. Returns the exit code.
/// Errors: ErrorKind::bad_data if the folder has no metrics.jsonl, or a line is not what a run writes.
int check_run(const std::string& folder, bool json);

}  // namespace microbatch::cli
