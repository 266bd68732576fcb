#include "microbatch/io/input_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>
#include <utility>

#include "microbatch/core/error.h"

namespace microbatch {
namespace {

template <class... Parts>
[[noreturn]] void refuse(const std::filesystem::path& path, const Parts&... reason) {
    throw Error(ErrorKind::bad_data, "cannot read ", path.string(), ": ", reason...);
}

[[noreturn]] void refuse_for(int error_number, const std::filesystem::path& path) {
    refuse(path, std::generic_category().message(error_number));
}

}  // namespace

InputFile::InputFile(std::filesystem::path path) : path_(std::move(path)) {
    // O_NONBLOCK: opening a pipe without a writer would wait forever before it could be refused.
    descriptor_ = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (descriptor_ < 0) refuse_for(errno, path_);
    struct stat status {};
    const int error_number = ::fstat(descriptor_, &status) == 0 ? 0 : errno;
    if (error_number == 0 && S_ISREG(status.st_mode)) {
        size_ = static_cast<std::uint64_t>(status.st_size);
        return;
    }
    ::close(descriptor_);
    if (error_number != 0) refuse_for(error_number, path_);
    if (S_ISDIR(status.st_mode)) refuse_for(EISDIR, path_);
    refuse(path_, "not a regular file");
}

InputFile::InputFile(InputFile&& other) noexcept
    : path_(std::move(other.path_)),
      descriptor_(std::exchange(other.descriptor_, -1)),
      size_(std::exchange(other.size_, 0)) {}

InputFile& InputFile::operator=(InputFile&& other) noexcept {
    std::swap(path_, other.path_);
    std::swap(descriptor_, other.descriptor_);
    std::swap(size_, other.size_);
    return *this;
}

InputFile::~InputFile() {
    if (descriptor_ >= 0) ::close(descriptor_);
}

void InputFile::read(std::uint64_t offset, std::span<std::byte> into) const {
    while (!into.empty()) {
        const ssize_t count = ::pread(descriptor_, into.data(), into.size(), static_cast<off_t>(offset));
        if (count < 0 && errno == EINTR) continue;
        if (count < 0) refuse_for(errno, path_);
        if (count == 0) refuse(path_, "it ends at byte ", offset, "; it had ", size_, " bytes when it was opened");
        into = into.subspan(static_cast<std::size_t>(count));
        offset += static_cast<std::uint64_t>(count);
    }
}

std::string InputFile::read_all(std::uint64_t most) const {
    if (size_ > most) refuse(path_, "it has ", size_, " bytes, more than the allowed ", most);
    std::string content(static_cast<std::size_t>(size_), '\0');
    read(0, std::as_writable_bytes(std::span(content)));
    return content;
}

}  // namespace microbatch
