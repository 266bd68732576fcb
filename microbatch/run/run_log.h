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

/// metrics.jsonl: one JSON object a step, one a line, each written through at once.
///
/// Keys: see step_fields().
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
    std::string write(const StepRecord& record);

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

struct LoggedRun {
    std::vector<StepRecord> steps;
    bool cut = false;  ///< the last line is incomplete, as a process that is killed leaves it; it is ignored
};

/// Reads a run's metrics.jsonl.
/// Memory: the steps, and a line of at most 1 MiB.
/// Errors: ErrorKind::bad_data, naming file and line, if there is none, it holds no step, or a line that is not the
///         last is none that RunLog writes.
LoggedRun read_run_log(const std::filesystem::path& folder);

}  // namespace microbatch
