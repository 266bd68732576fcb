#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>

namespace microbatch {

/// A regular file open for reading at any offset. It is read, not mapped: if the file is truncated in the meantime,
/// reading reports an error, while a mapping would end the process (SIGBUS). A deleted file stays readable.
///
/// Errors:  the constructor throws ErrorKind::bad_data, with the path and the system's reason, if the file is missing,
///          unreadable, a folder or otherwise not a regular file. Opening a pipe does not block. An empty file is
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

    /// The size when it was opened.
    std::uint64_t size() const { return size_; }
    const std::filesystem::path& path() const { return path_; }

    /// Reads exactly as many bytes as `into` holds, from this offset.
    /// Errors: ErrorKind::bad_data, naming the file, if it has fewer bytes (it was truncated), or the system cannot
    ///         read them. The content of `into` is then unspecified.
    void read(std::uint64_t offset, std::span<std::byte> into) const;

    /// The whole content. Errors: as read(); ErrorKind::bad_data if it is more than `most` bytes.
    std::string read_all(std::uint64_t most) const;

private:
    std::filesystem::path path_;
    int descriptor_ = -1;
    std::uint64_t size_ = 0;
};

}  // namespace microbatch
