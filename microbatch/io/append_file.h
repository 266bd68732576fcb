#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>

namespace microbatch {

/// A file to which whole records, such as lines, are appended; each one is written immediately.
///
/// Faults:  a record that cannot be written completely (disk full) is removed from the file and kept in memory, like
///          those after it, and written with the next record that can be written: a log must not end a run.
/// Memory:  the records that could not be written.
/// Threads: no two calls at the same time.
class AppendFile {
public:
    /// Creates a new file. Errors: ErrorKind::not_written if it cannot be created, or if the name is already in use.
    explicit AppendFile(std::filesystem::path path);

    /// Opens an existing file and keeps its first `bytes`. Errors: ErrorKind::not_written if it cannot be opened or
    /// truncated, or is not a regular file; ErrorKind::bad_data if it is shorter.
    AppendFile(std::filesystem::path path, std::uint64_t bytes);

    AppendFile(const AppendFile&) = delete;
    AppendFile& operator=(const AppendFile&) = delete;
    ~AppendFile();

    /// Appends a record. Returns why it, or an earlier one, could not be written; empty if all are written.
    std::string append(std::string_view record);

    /// Retries the records that could not be written. Returns as append().
    std::string flush() { return append({}); }

    const std::filesystem::path& path() const { return path_; }

private:
    enum class Flags : int {};  // of open()
    AppendFile(std::filesystem::path path, Flags flags);
    [[noreturn]] void refuse(const std::string& why) const;

    std::filesystem::path path_;
    int descriptor_ = -1;
    std::uint64_t size_ = 0;  // of the whole records in the file
    std::string waiting_;
};

}  // namespace microbatch
