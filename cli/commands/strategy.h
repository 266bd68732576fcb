#pragma once

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "cli/commands/job.h"

namespace microbatch::cli {

/// One way to train on the same samples, and what came of it.
struct Strategy {
    std::string name;
    std::int64_t batch = 0;
    Plan plan = {};
    std::int64_t memory_bytes = 0;  ///< budget of its process
    bool can_run = true;
    // Below: measured, the first seed's where nothing else is said.
    bool ran = false;
    bool diverged = false;
    std::string failure = {};           ///< why a run of it did not finish; no other is begun then
    std::int64_t peak_bytes = 0;        ///< predicted, until it ran
    double step_seconds = 0.0;          ///< median
    double seconds = 0.0;               ///< in all
    std::vector<double> held_out = {};  ///< of each seed
    std::optional<double> variance = {}, curvature = {};
    std::vector<double> losses_along = {};  ///< at distances()

    double sample_seconds(std::int64_t samples) const { return seconds / static_cast<double>(samples); }
};

/// How far along a filter-normalised direction losses are looked at.
const std::vector<double>& distances();

/// Trains it in a process of its own, in folder/NAME-SEED, so that its peak is its own. Where that fails, the strategy
/// says why.
/// Errors: Interrupted; ErrorKind::usage if there can be no process.
void train_in_child(std::FILE* out, const JobPlan& plan, std::int64_t samples, std::uint64_t seed,
                    const std::filesystem::path& folder, Strategy& strategy);

/// The file in that folder that tells the process what to do; whoever made the folder removes it.
inline constexpr const char* config_name = "given.toml";

/// The folder of that run.
std::filesystem::path folder_of(const std::filesystem::path& folder, const Strategy& strategy, std::uint64_t seed);

/// Gradient variance of every strategy, at the parameters that the first of `at` ended with; curvature and losses along
/// a direction at those that each ended with.
void measure_at_the_end(std::FILE* out, const JobPlan& plan, const std::filesystem::path& folder, const Strategy& at,
                        std::vector<Strategy>& strategies);

}  // namespace microbatch::cli
