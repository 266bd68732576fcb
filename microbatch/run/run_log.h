#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "microbatch/io/append_file.h"
#include "microbatch/io/file_system.h"
#include "microbatch/run/step_record.h"

namespace microbatch {

/// metrics.jsonl: one line with a JSON object per step, each written immediately.
///
/// Keys: see step_fields().
/// Faults:  a line that cannot be written (disk full) is kept and written with the next one that can be: see
///          AppendFile.
/// Threads: no two calls at the same time.
class RunLog {
public:
    /// Creates the folder if it is missing, and a new metrics.jsonl in it.
    /// Errors: ErrorKind::usage if the folder cannot be written, or already has a metrics.jsonl.
    explicit RunLog(const std::filesystem::path& folder);

    /// Continues the log of a run that resumes after so many steps: drops later lines and invalid lines. lines() then
    /// shows whether any are missing.
    /// Errors: ErrorKind::usage as above, and ErrorKind::bad_data if it cannot be read; it is then unchanged. If there
    ///         is no log, a new one is created.
    RunLog(const std::filesystem::path& folder, std::int64_t steps, FileSystem& files = system_files());

    /// Why the line, or an earlier one, could not be written, naming the file; empty if all are written.
    std::string write(const StepRecord& record);

    /// Retries the lines that could not be written. Returns as write().
    std::string flush() { return file_->flush(); }

    /// The number of lines so far, including those not yet written.
    std::int64_t lines() const { return lines_; }

    const std::filesystem::path& path() const { return path_; }

private:
    std::filesystem::path path_;
    std::optional<AppendFile> file_;
    std::int64_t lines_ = 0;
};

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
