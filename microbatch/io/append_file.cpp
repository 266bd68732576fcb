#include "microbatch/io/append_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>
#include <utility>

#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"

namespace microbatch {
namespace {

std::string last_error() {
    return std::generic_category().message(errno);
}

}  // namespace

AppendFile::AppendFile(std::filesystem::path path) : AppendFile(std::move(path), Flags(O_CREAT | O_EXCL)) {}

AppendFile::AppendFile(std::filesystem::path path, std::uint64_t bytes) : AppendFile(std::move(path), Flags()) {
    struct stat status {};
    if (::fstat(descriptor_, &status) != 0) refuse(last_error());
    if (!S_ISREG(status.st_mode)) refuse("not a regular file");
    if (static_cast<std::uint64_t>(status.st_size) < bytes)
        throw Error(ErrorKind::bad_data, path_.string(), " is shorter than the ", bytes, " bytes to keep");
    if (::ftruncate(descriptor_, static_cast<off_t>(bytes)) != 0) refuse(last_error());
    size_ = bytes;
}

AppendFile::AppendFile(std::filesystem::path path, Flags flags) : path_(std::move(path)) {
    // O_NONBLOCK: a pipe without a reader is refused instead of waiting.
    descriptor_ = ::open(path_.c_str(), O_WRONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK | static_cast<int>(flags), 0666);
    if (descriptor_ < 0) refuse(last_error());
}

AppendFile::~AppendFile() {
    ::close(descriptor_);
}

void AppendFile::refuse(const std::string& why) const {
    throw Error(ErrorKind::not_written, "cannot write ", path_.string(), ": ", why);
}

std::string AppendFile::append(std::string_view record) {
    waiting_ += record;
    std::string_view rest = waiting_;
    while (!rest.empty()) {
        const auto at = static_cast<off_t>(size_ + (waiting_.size() - rest.size()));
        const ssize_t count = ::pwrite(descriptor_, rest.data(), rest.size(), at);
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0) {
            const std::string why = str_cat("cannot write ", path_.string(), ": ", last_error());
            // Half a record is worse than none. If this fails too, the next attempt overwrites it.
            [[maybe_unused]] const int cut = ::ftruncate(descriptor_, static_cast<off_t>(size_));
            return why;
        }
        rest.remove_prefix(static_cast<std::size_t>(count));
    }
    size_ += waiting_.size();
    waiting_.clear();
    return {};
}

}  // namespace microbatch
