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
/// Errors: every call throws ErrorKind::not_written, naming the file and the system's reason, where it cannot be done
/// (disk
///         full, short write); what the file holds then is not said.
class OutputFile {
public:
    OutputFile() = default;
    OutputFile(const OutputFile&) = delete;
    OutputFile& operator=(const OutputFile&) = delete;
    /// Closes it, and says nothing of how that went.
    virtual ~OutputFile() = default;

    virtual void write(std::string_view bytes) = 0;

    /// Returns once all that was written is on the disk.
    virtual void sync() = 0;

    virtual void close() = 0;
};

/// What is done to files where a fault must lose nothing: behind an interface, so that tests can make each call fail.
///
/// Errors:  ErrorKind::not_written, naming the file and the system's reason; a call that throws has changed nothing,
/// but for
///          remove_all, which may have removed a part.
/// Threads: calls may overlap.
class FileSystem {
public:
    FileSystem() = default;
    FileSystem(const FileSystem&) = delete;
    FileSystem& operator=(const FileSystem&) = delete;
    virtual ~FileSystem() = default;

    /// A new file; refused if there is one, or a link, of that name.
    virtual std::unique_ptr<OutputFile> create(const std::filesystem::path& file) = 0;

    /// With those that it is in. It is no error if it is there already.
    virtual void make_folder(const std::filesystem::path& folder) = 0;

    /// Takes the place of a file of that name, or of an empty folder, at once.
    virtual void rename(const std::filesystem::path& from, const std::filesystem::path& to) = 0;

    /// A file, or a folder with all in it. It is no error if there is none.
    virtual void remove_all(const std::filesystem::path& path) = 0;

    /// Returns once the content of a file, or the names in a folder, are on the disk.
    virtual void sync(const std::filesystem::path& path) = 0;
};

/// The system's own.
FileSystem& system_files();

/// What is in a folder, in any order: all that could be listed before a failure, which is told.
std::vector<std::filesystem::path> paths_in(const std::filesystem::path& folder, std::error_code& failure);

/// Makes a folder and those that it is in; returns once the names of those that were not there are on the disk.
/// Errors: as FileSystem's.
void make_folders_to_the_disk(FileSystem& files, const std::filesystem::path& folder);

/// "; 1.2 MiB are needed, 400 KiB are free" where a folder's file system has less than that; empty if it has not.
std::string lack_of_space(const std::filesystem::path& folder, std::int64_t needed);

/// Writes a file, whole or not at all, and to the disk: under another name beside it first, then renamed.
/// Errors: ErrorKind::not_written if it cannot be written, naming it and why, and what `write` throws; what was there
/// before
///         stays then, unless it is only the folder that could not be brought to the disk.
void write_whole(const std::filesystem::path& file, const std::function<void(OutputFile&)>& write,
                 FileSystem& files = system_files());
void write_whole(const std::filesystem::path& file, std::string_view content, FileSystem& files = system_files());

}  // namespace microbatch
