#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "microbatch/core/batch_plan.h"

namespace microbatch {

/// A line of metrics.jsonl, see RunLog.
struct LoggedStep {
    std::int64_t step = 0, samples = 0, tokens = 0, batch = 0;
    double loss = 0.0, learning_rate = 0.0, gradient_norm = 0.0;
    Plan plan = {};
    std::int64_t out_of_memory = 0;
    double seconds = 0.0;
    std::optional<double> predicted_seconds = {};
    double update_seconds = 0.0;  ///< of those, the optimizer's
    std::int64_t peak_bytes = 0;
    std::optional<std::int64_t> predicted_peak_bytes = {};
    bool applied = true;
    std::string reason = {};
    std::optional<std::int64_t> went_back_to = {};
    std::optional<double> noise_batch = {};
};

struct LoggedRun {
    std::vector<LoggedStep> steps;
    bool cut = false;  ///< the last line ends in its midst, as a process that is killed leaves it; it is left out
};

/// Reads a run's metrics.jsonl.
/// Memory: the steps, and a line of at most 1 MiB.
/// Errors: ErrorKind::bad_data, naming file and line, if there is none, it holds no step, or a line that is not the
///         last is none that RunLog writes.
LoggedRun read_run_log(const std::filesystem::path& folder);

}  // namespace microbatch
