#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>

#include "microbatch/io/append_file.h"

namespace microbatch {

/// A number to draw over the steps.
struct Scalar {
    std::string_view name;
    double value = 0.0;
};

/// events.out.tfevents.*: what TensorBoard reads, written through a step at a time.
///
/// Faults:  as RunLog's.
/// Format: records of (length, masked CRC-32C of it, data, masked CRC-32C of it), each an Event of tensorboard's
///         event.proto: wall_time, step, and a summary of simple values; the first names the version.
/// Threads: no two calls at the same time.
class EventFile {
public:
    /// Makes a new file in the folder, named after now and this process.
    /// Errors: ErrorKind::not_written if it cannot be written.
    explicit EventFile(const std::filesystem::path& folder);

    /// Tells TensorBoard that a run goes on after so many steps: what other files of the folder have of later ones is
    /// not drawn. As write().
    std::string go_on(std::int64_t steps);

    /// Adds the numbers of a step; none is left out for not being finite. Returns why they, or those before them, could
    /// not be written, naming the file; empty if all are.
    std::string write(std::int64_t step, std::span<const Scalar> scalars);

    const std::filesystem::path& path() const { return file_.path(); }

private:
    std::string write_record(const std::string& data);

    AppendFile file_;
};

}  // namespace microbatch
