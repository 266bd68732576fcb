#include "microbatch/io/line_reader.h"

#include <cerrno>
#include <cstring>
#include <limits>

#include "microbatch/core/error.h"
#include "microbatch/io/input_file.h"

namespace microbatch {

LineReader::LineReader(const std::filesystem::path& path, LongLines long_lines)
    : path_(path), long_lines_(long_lines), line_(longest + 1, '\0') {
    const InputFile check(path);  // a stream would wait for a pipe, and does not say why a file cannot be opened
    errno = 0;
    in_.open(path, std::ios::binary);
    if (!in_.is_open()) refuse();
}

// The stream leaves the reason of the system's call in errno.
void LineReader::refuse() const {
    const int reason = errno;
    throw Error(ErrorKind::bad_data, "cannot read ", path_.string(), ": ",
                reason != 0 ? std::strerror(reason) : "the read failed");
}

std::optional<std::string_view> LineReader::next() {
    errno = 0;
    in_.getline(line_.data(), static_cast<std::streamsize>(line_.size()));
    if (in_.bad()) refuse();
    const auto taken = static_cast<std::uint64_t>(in_.gcount());  // including the line break
    if (taken == 0 && in_.eof()) return std::nullopt;
    ++number_;
    offset_ += taken;
    const bool too_long = in_.fail() && !in_.eof();
    if (too_long && long_lines_ == LongLines::refuse) {
        throw Error(ErrorKind::bad_data, path_.string(), " line ", number_, " is longer than ", longest, " bytes");
    }
    if (too_long) {
        in_.clear();
        in_.ignore(std::numeric_limits<std::streamsize>::max(), '\n');
        if (in_.bad()) refuse();
        offset_ += static_cast<std::uint64_t>(in_.gcount());
    }
    whole_ = !in_.eof();
    return std::string_view(line_).substr(0, too_long ? 0 : taken - (whole_ ? 1 : 0));
}

}  // namespace microbatch
