#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>

namespace microbatch {

/// A file that grows by whole records, such as lines, each written through at once.
///
/// Faults:  a record that cannot be written whole (disk full) is taken back from the file and kept in memory, with
/// those
///          after it, and written with the next one that can be: a log is no reason to lose a run.
/// Memory:  what could not be written.
/// Threads: no two calls at the same time.
class AppendFile {
public:
    /// A new file. Errors: ErrorKind::not_written if it cannot be made, or there is a file, or a link, of that name.
    explicit AppendFile(std::filesystem::path path);

    /// One that is there, of which the first `bytes` stay. Errors: ErrorKind::not_written if it cannot be opened or
    /// cut, or is no regular file; ErrorKind::bad_data if it is shorter.
    AppendFile(std::filesystem::path path, std::uint64_t bytes);

    AppendFile(const AppendFile&) = delete;
    AppendFile& operator=(const AppendFile&) = delete;
    ~AppendFile();

    /// Why it, or those before it, could not be written; empty if all are.
    std::string append(std::string_view record);

    /// Tries again what could not be written. As append().
    std::string flush() { return append({}); }

    const std::filesystem::path& path() const { return path_; }

private:
    enum class Flags : int {};  // of open()
    AppendFile(std::filesystem::path path, Flags flags);
    [[noreturn]] void refuse(const std::string& why) const;

    std::filesystem::path path_;
    int descriptor_ = -1;
    std::uint64_t size_ = 0;  // of the whole records in it
    std::string waiting_;
};

}  // namespace microbatch
