#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>

namespace microbatch {

/// A regular file open for reading at any offset. It is read, not mapped: a file that somebody shortens meanwhile is an
/// error that can be handled, where a mapping would end the process (SIGBUS); one that is removed stays readable.
///
/// Errors:  the constructor throws ErrorKind::bad_data, with the path and the system's reason, if the file is missing,
///          unreadable, a folder or otherwise not a regular file: opening a pipe does not wait. An empty file is
///          allowed.
/// Threads: const calls may overlap.
class InputFile {
public:
    explicit InputFile(std::filesystem::path path);
    InputFile(InputFile&& other) noexcept;
    InputFile& operator=(InputFile&& other) noexcept;
    InputFile(const InputFile&) = delete;
    InputFile& operator=(const InputFile&) = delete;
    ~InputFile();

    /// Bytes when it was opened.
    std::uint64_t size() const { return size_; }
    const std::filesystem::path& path() const { return path_; }

    /// Reads exactly as many bytes as `into` holds, from this offset.
    /// Errors: ErrorKind::bad_data, naming the file, if there are not so many (it has become shorter since), or the
    ///         system cannot read them. What `into` holds then is not said.
    void read(std::uint64_t offset, std::span<std::byte> into) const;

    /// The whole content. Errors: as read(); ErrorKind::bad_data if it is more than `most` bytes.
    std::string read_all(std::uint64_t most) const;

private:
    std::filesystem::path path_;
    int descriptor_ = -1;
    std::uint64_t size_ = 0;
};

}  // namespace microbatch
