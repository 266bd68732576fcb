#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>

#include "microbatch/io/append_file.h"

namespace microbatch {

/// A number that TensorBoard draws over the steps.
struct Scalar {
    std::string_view name;
    double value = 0.0;
};

/// events.out.tfevents.*: the file that TensorBoard reads, written step by step.
///
/// Faults:  as RunLog's.
/// Format: records of (length, masked CRC-32C of it, data, masked CRC-32C of it), each an Event of tensorboard's
///         event.proto: wall_time, step, and a summary of simple values; the first names the version.
/// Threads: no two calls at the same time.
class EventFile {
public:
    /// Creates a new file in the folder, named after the time and this process.
    /// Errors: ErrorKind::not_written if it cannot be written.
    explicit EventFile(const std::filesystem::path& folder);

    /// Tells TensorBoard that a run resumes after so many steps: later steps from other files in the folder are not
    /// drawn. Returns as write().
    std::string go_on(std::int64_t steps);

    /// Adds the numbers of a step, including those that are not finite. Returns why they, or earlier ones, could not be
    /// written, naming the file; empty if all are written.
    std::string write(std::int64_t step, std::span<const Scalar> scalars);

    const std::filesystem::path& path() const { return file_.path(); }

private:
    std::string write_record(const std::string& data);

    AppendFile file_;
};

}  // namespace microbatch
