#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>

#include "microbatch/io/append_file.h"
#include "microbatch/io/file_system.h"
#include "microbatch/run/trainer.h"

namespace microbatch {

/// What the log holds of a step beside the trainer's own report.
struct StepMeasures {
    std::int64_t peak_bytes = 0;
    std::optional<std::int64_t> predicted_peak_bytes = {};  ///< none if nothing was predicted
    std::optional<double> predicted_step_seconds = {};
};

/// metrics.jsonl: one JSON object a step, one a line, each written through at once.
///
/// Keys: step, samples, tokens, batch (samples in this step), loss, weight, learning_rate, gradient_norm, micro_batch,
/// micro_batches, recompute, out_of_memory (how often the step was begun again), step_seconds, update_seconds (of
/// those, the optimizer's), predicted_step_seconds (or null), peak_bytes, predicted_peak_bytes (or null), applied,
/// reason, went_back_to (the step after which the parameters now are, or null), gradient_variance and squared_gradient
/// (see NoiseMeasure, or null), noise_batch (in samples, or null). Numbers that are not finite are the strings "nan",
/// "inf" and "-inf".
/// Faults:  a line that cannot be written (disk full) is kept and written with the next one that can be: see
/// AppendFile. Threads: no two calls at the same time.
class RunLog {
public:
    /// Makes the folder where it is missing, and a new metrics.jsonl in it.
    /// Errors: ErrorKind::usage if the folder cannot be written, or holds a metrics.jsonl already.
    explicit RunLog(const std::filesystem::path& folder);

    /// Goes on with the log of a run that goes on after so many steps: the lines after them are left out, and so is
    /// what is no line of a step. lines() then tells whether all are there.
    /// Errors: ErrorKind::usage as above, and ErrorKind::bad_data if it cannot be read: it is as it was then. A log
    /// that
    ///         is not there is begun anew.
    RunLog(const std::filesystem::path& folder, std::int64_t steps, FileSystem& files = system_files());

    /// Why the line, or those before it, could not be written, naming the file; empty if all are.
    std::string write(const TrainerReport& report, const StepMeasures& measures);

    /// Tries again what could not be written. As write().
    std::string flush() { return file_->flush(); }

    /// Lines so far, those that wait included.
    std::int64_t lines() const { return lines_; }

    const std::filesystem::path& path() const { return path_; }

private:
    std::filesystem::path path_;
    std::optional<AppendFile> file_;
    std::int64_t lines_ = 0;
};

}  // namespace microbatch
