#pragma once

#include <cstddef>
#include <filesystem>
#include <span>

namespace microbatch {

/// A file mapped into memory for reading: pages are fetched when they are touched and can be dropped at any time.
///
/// Errors:  the constructor throws ErrorKind::bad_data, with the path and the system's reason, if the file is missing,
///          unreadable, a folder or otherwise not a regular file. An empty file is allowed.
/// State:   the mapping lives as long as this object. Another process that shortens the file meanwhile makes the lost
///          pages fault (SIGBUS), as with every mapping.
/// Threads: const calls may overlap.
class MappedFile {
public:
    explicit MappedFile(const std::filesystem::path& path);
    MappedFile(MappedFile&& other) noexcept;
    MappedFile& operator=(MappedFile&& other) noexcept;
    MappedFile(const MappedFile&) = delete;
    MappedFile& operator=(const MappedFile&) = delete;
    ~MappedFile();

    /// The content, page-aligned; an empty span for an empty file or one that was moved from.
    std::span<const std::byte> bytes() const noexcept { return bytes_; }

private:
    std::span<const std::byte> bytes_;
};

}  // namespace microbatch
