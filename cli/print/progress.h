#pragma once

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <string>

#include "cli/print/output.h"
#include "microbatch/core/units.h"
#include "microbatch/run/trainer.h"

namespace microbatch::cli {

/// Shows the progress of a run: on a terminal, one line that is redrawn; in a pipe, a plain line every few seconds.
/// Draws at most ten times per second, so that the cost is negligible.
class ProgressLine {
public:
    /// speed_unit: "tokens" or "images".
    /// begun: the progress of a resumed run.
    ProgressLine(std::FILE* stream, Interval length, const char* speed_unit, std::int64_t budget_bytes,
                 const Progress& begun = {});

    /// After every step. peak_bytes: the largest so far.
    void update(const TrainerReport& report, std::int64_t peak_bytes);

    /// Prints a separate line, for rare events.
    void note(const std::string& text);

    /// Draws the last state and ends the line; safe to call twice.
    void finish();

private:
    std::string line() const;

    std::FILE* stream_;
    LiveLine live_;
    Interval length_;
    const char* speed_unit_;
    std::int64_t budget_bytes_;
    Progress begun_;
    std::chrono::steady_clock::time_point started_;
    TrainerReport last_;
    std::int64_t peak_bytes_ = 0;
    bool pending_ = false;
    std::int64_t losses_ = 0;
    double loss_ = 0.0;  // mean over the last steps, weighted towards the newest
};

}  // namespace microbatch::cli
