#pragma once

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "cli/commands/job.h"

namespace microbatch::cli {

/// One way to train on the same samples, and its results.
struct Strategy {
    std::string name;
    std::int64_t batch = 0;
    Plan plan = {};
    std::int64_t memory_bytes = 0;  ///< the budget of its process
    bool can_run = true;
    // Below: measurements, of the first seed unless stated otherwise.
    bool ran = false;
    bool diverged = false;
    std::string failure = {};           ///< why a run did not finish; no further run is started then
    std::int64_t peak_bytes = 0;        ///< predicted until it has run
    double step_seconds = 0.0;          ///< median
    double seconds = 0.0;               ///< total
    std::vector<double> held_out = {};  ///< of each seed
    std::optional<double> variance = {}, curvature = {};
    std::vector<double> losses_along = {};  ///< at distances()

    double sample_seconds(std::int64_t samples) const { return seconds / static_cast<double>(samples); }
};

/// The distances along a filter-normalised direction at which the loss is computed.
const std::vector<double>& distances();

/// Trains it in its own process, in folder/NAME-SEED, so that its peak memory can be measured. If that fails,
/// `failure` says why.
/// Errors: Interrupted; ErrorKind::usage if the process cannot be started.
void train_in_child(std::FILE* out, const JobPlan& plan, std::int64_t samples, std::uint64_t seed,
                    const std::filesystem::path& folder, Strategy& strategy);

/// The folder of that run.
std::filesystem::path folder_of(const std::filesystem::path& folder, const Strategy& strategy, std::uint64_t seed);

/// Measures the gradient variance of every strategy at the final parameters of the first one, and the curvature and the
/// losses along a direction at the final parameters of each.
void measure_at_the_end(std::FILE* out, const JobPlan& plan, const std::filesystem::path& folder, const Strategy& at,
                        std::vector<Strategy>& strategies);

}  // namespace microbatch::cli
