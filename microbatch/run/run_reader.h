#pragma once

#include <filesystem>
#include <vector>

#include "microbatch/run/step_record.h"

namespace microbatch {

struct LoggedRun {
    std::vector<StepRecord> steps;
    bool cut = false;  ///< the last line is incomplete, as after a kill; it is ignored
};

/// Reads a run's metrics.jsonl.
/// Memory: the steps, and a line of at most 1 MiB.
/// Errors: ErrorKind::bad_data, naming file and line, if there is no log, it has no steps, or a line other than the
///         last was not written by RunLog.
LoggedRun read_run_log(const std::filesystem::path& folder);

}  // namespace microbatch
