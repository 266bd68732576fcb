#include "microbatch/io/file_system.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <utility>

#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"
#include "microbatch/core/units.h"

namespace microbatch {
namespace {

[[noreturn]] void refuse(const char* what, const std::filesystem::path& path, const std::error_code& why) {
    throw Error(ErrorKind::not_written, "cannot ", what, " ", path.string(), ": ", why.message());
}

std::error_code last_error() {
    return {errno, std::generic_category()};
}

class SystemFile final : public OutputFile {
public:
    explicit SystemFile(std::filesystem::path path) : path_(std::move(path)) {
        descriptor_ = ::open(path_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        if (descriptor_ < 0) refuse("write", path_, last_error());
    }
    SystemFile(const SystemFile&) = delete;
    SystemFile& operator=(const SystemFile&) = delete;
    ~SystemFile() override {
        if (descriptor_ >= 0) ::close(descriptor_);
    }

    void write(std::string_view bytes) override {
        while (!bytes.empty()) {
            const ssize_t count = ::write(descriptor_, bytes.data(), bytes.size());
            if (count < 0 && errno == EINTR) continue;
            if (count < 0) refuse("write", path_, last_error());
            bytes.remove_prefix(static_cast<std::size_t>(count));
        }
    }

    void sync() override {
        if (::fsync(descriptor_) != 0) refuse("write", path_, last_error());
    }

    void close() override {
        // Whatever it returns, the descriptor is closed.
        if (::close(std::exchange(descriptor_, -1)) != 0) refuse("write", path_, last_error());
    }

private:
    std::filesystem::path path_;
    int descriptor_ = -1;
};

class SystemFiles final : public FileSystem {
public:
    std::unique_ptr<OutputFile> create(const std::filesystem::path& file) override {
        return std::make_unique<SystemFile>(file);
    }

    void make_folder(const std::filesystem::path& folder) override {
        std::error_code failure;
        std::filesystem::create_directories(folder, failure);
        if (failure) refuse("create the folder", folder, failure);
    }

    void rename(const std::filesystem::path& from, const std::filesystem::path& to) override {
        std::error_code failure;
        std::filesystem::rename(from, to, failure);
        if (failure) refuse("write", to, failure);
    }

    void remove_all(const std::filesystem::path& path) override {
        std::error_code failure;
        std::filesystem::remove_all(path, failure);
        if (failure) refuse("remove", path, failure);
    }

    void sync(const std::filesystem::path& path) override {
        const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
        if (descriptor < 0) refuse("write", path, last_error());
        const bool synced = ::fsync(descriptor) == 0;
        const std::error_code why = last_error();
        ::close(descriptor);
        // Some file systems do not support this for folders.
        if (!synced && why.value() != EINVAL) refuse("write", path, why);
    }
};

}  // namespace

FileSystem& system_files() {
    static SystemFiles files;
    return files;
}

std::vector<std::filesystem::path> paths_in(const std::filesystem::path& folder, std::error_code& failure) {
    std::vector<std::filesystem::path> paths;
    std::filesystem::directory_iterator entry(folder, failure);
    for (; !failure && entry != std::filesystem::directory_iterator(); entry.increment(failure)) {
        paths.push_back(entry->path());
    }
    return paths;
}

void make_folders_to_the_disk(FileSystem& files, const std::filesystem::path& folder) {
    std::vector<std::filesystem::path> made;
    std::error_code failure;
    // If the state is unknown, creating it reports the error.
    for (auto at = std::filesystem::absolute(folder); !std::filesystem::exists(at, failure) && !failure;
         at = at.parent_path()) {
        made.push_back(at);
    }
    files.make_folder(folder);
    for (const auto& at : made) files.sync(at.parent_path());
}

std::string lack_of_space(const std::filesystem::path& folder, std::int64_t needed) {
    std::error_code unknown;
    const std::uintmax_t available = std::filesystem::space(folder, unknown).available;
    if (unknown || available >= static_cast<std::uintmax_t>(needed)) return {};
    return str_cat("; ", format_bytes(needed), " are needed, ", format_bytes(static_cast<std::int64_t>(available)),
                   " are free");
}

void write_whole(const std::filesystem::path& file, const std::function<void(OutputFile&)>& write, FileSystem& files) {
    std::filesystem::path unfinished = file;
    unfinished += ".part";
    try {
        files.remove_all(unfinished);
        const std::unique_ptr<OutputFile> out = files.create(unfinished);
        write(*out);
        out->sync();
        out->close();
        files.rename(unfinished, file);
    } catch (...) {
        std::error_code ignored;
        std::filesystem::remove(unfinished, ignored);
        throw;
    }
    files.sync(file.has_parent_path() ? file.parent_path() : ".");
}

void write_whole(const std::filesystem::path& file, std::string_view content, FileSystem& files) {
    write_whole(
        file, [content](OutputFile& out) { out.write(content); }, files);
}

}  // namespace microbatch
