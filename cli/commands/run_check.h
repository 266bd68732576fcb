#pragma once

#include <string>

namespace microbatch::cli {

/// Prints predictions and measurements of a run from its metrics.jsonl: peak memory and time per step, for each plan
/// that it used. Returns the exit code.
/// Errors: ErrorKind::bad_data if the folder has no metrics.jsonl, or a line cannot be parsed.
int check_run(const std::string& folder, bool json);

}  // namespace microbatch::cli
