#include "microbatch/data/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <string>
#include <system_error>
#include <utility>

#include "microbatch/core/error.h"
#include "microbatch/core/text.h"

namespace microbatch {
namespace {

[[noreturn]] void refuse(const std::filesystem::path& path, const std::string& reason) {
    throw Error(ErrorKind::bad_data, text("cannot read ", path.string(), ": ", reason));
}

[[noreturn]] void refuse(const std::filesystem::path& path, int error_number) {
    refuse(path, std::generic_category().message(error_number));
}

struct Descriptor {
    int number;
    ~Descriptor() {
        if (number >= 0) ::close(number);
    }
};

}  // namespace

MappedFile::MappedFile(const std::filesystem::path& path) {
    // O_NONBLOCK: opening a pipe that nobody writes to would wait for ever before it could be refused.
    const Descriptor file{::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)};
    if (file.number < 0) refuse(path, errno);
    struct stat status {};
    if (::fstat(file.number, &status) != 0) refuse(path, errno);
    if (S_ISDIR(status.st_mode)) refuse(path, EISDIR);
    if (!S_ISREG(status.st_mode)) refuse(path, "not a regular file");
    const auto size = static_cast<std::size_t>(status.st_size);
    if (size == 0) return;  // mmap refuses a length of 0
    void* start = ::mmap(nullptr, size, PROT_READ, MAP_SHARED, file.number, 0);
    if (start == MAP_FAILED) refuse(path, errno);
    bytes_ = {static_cast<const std::byte*>(start), size};
}

MappedFile::MappedFile(MappedFile&& other) noexcept : bytes_(std::exchange(other.bytes_, {})) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
    MappedFile taken(std::move(other));
    std::swap(bytes_, taken.bytes_);
    return *this;
}

MappedFile::~MappedFile() {
    if (!bytes_.empty()) ::munmap(const_cast<std::byte*>(bytes_.data()), bytes_.size());
}

}  // namespace microbatch
