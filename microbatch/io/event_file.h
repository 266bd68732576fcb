#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <span>
#include <string>
#include <string_view>

namespace microbatch {

/// A number to draw over the steps.
struct Scalar {
    std::string_view name;
    double value = 0.0;
};

/// events.out.tfevents.*: what TensorBoard reads, written through a step at a time.
///
/// Format: records of (length, masked CRC-32C of it, data, masked CRC-32C of it), each an Event of tensorboard's
///         event.proto: wall_time, step, and a summary of simple values; the first names the version.
/// Threads: no two calls at the same time.
class EventFile {
public:
    /// Makes a new file in the folder, named after now and this process.
    /// Errors: ErrorKind::usage if it cannot be written.
    explicit EventFile(const std::filesystem::path& folder);

    /// Adds the numbers of a step; none is left out for not being finite.
    /// Errors: ErrorKind::usage if they cannot be written (disk full); it names the file.
    void write(std::int64_t step, std::span<const Scalar> scalars);

    const std::filesystem::path& path() const { return path_; }

private:
    void write_record(const std::string& data);

    std::filesystem::path path_;
    std::ofstream file_;
};

}  // namespace microbatch
