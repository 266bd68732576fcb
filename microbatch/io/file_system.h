#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

namespace microbatch {

/// A new file that is being written.
///
/// Errors: every call throws ErrorKind::not_written, naming the file and the system's reason, if it fails (disk full,
///         partial write); the content of the file is then unspecified.
class OutputFile {
public:
    OutputFile() = default;
    OutputFile(const OutputFile&) = delete;
    OutputFile& operator=(const OutputFile&) = delete;
    /// Closes the file and ignores errors.
    virtual ~OutputFile() = default;

    virtual void write(std::string_view bytes) = 0;

    /// Returns when everything written is on the disk.
    virtual void sync() = 0;

    virtual void close() = 0;
};

/// File operations that must not lose data on a fault, behind an interface, so that tests can make each call fail.
///
/// Errors:  ErrorKind::not_written, naming the file and the system's reason; a call that throws has changed nothing,
///          except that remove_all may have removed a part.
/// Threads: calls may overlap.
class FileSystem {
public:
    FileSystem() = default;
    FileSystem(const FileSystem&) = delete;
    FileSystem& operator=(const FileSystem&) = delete;
    virtual ~FileSystem() = default;

    /// Creates a new file; fails if the name is in use.
    virtual std::unique_ptr<OutputFile> create(const std::filesystem::path& file) = 0;

    /// Creates a folder and its parents. It is not an error if it exists.
    virtual void make_folder(const std::filesystem::path& folder) = 0;

    /// Renames; atomically replaces a file or an empty folder of the new name.
    virtual void rename(const std::filesystem::path& from, const std::filesystem::path& to) = 0;

    /// Deletes a file, or a folder with its content. A path that does not exist is not an error.
    virtual void remove_all(const std::filesystem::path& path) = 0;

    /// Returns when the content of a file, or the names in a folder, are on the disk.
    virtual void sync(const std::filesystem::path& path) = 0;
};

/// The file system of the operating system.
FileSystem& system_files();

/// The content of a folder, in any order; after a `failure`, what was listed before it.
std::vector<std::filesystem::path> paths_in(const std::filesystem::path& folder, std::error_code& failure);

/// Creates a folder and its parents; returns when their names are on the disk. Errors: as FileSystem.
void make_folders_to_the_disk(FileSystem& files, const std::filesystem::path& folder);

/// "; 1.2 MiB are needed, 400 KiB are free" if the file system of a folder has less free space; empty if it has enough.
std::string lack_of_space(const std::filesystem::path& folder, std::int64_t needed);

/// Writes a file atomically and syncs it to the disk: under a temporary name first, then renamed.
/// Errors: ErrorKind::not_written, naming the file and the reason, if it cannot be written; whatever `write` throws.
///         The previous file is then unchanged, unless only syncing the folder failed.
void write_whole(const std::filesystem::path& file, const std::function<void(OutputFile&)>& write,
                 FileSystem& files = system_files());
void write_whole(const std::filesystem::path& file, std::string_view content, FileSystem& files = system_files());

}  // namespace microbatch
