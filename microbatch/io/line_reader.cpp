#include "microbatch/io/line_reader.h"

#include <algorithm>
#include <span>

#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"

namespace microbatch {

void LineReader::read_chunk() {
    chunk_.resize(std::min(longest, file_.size() - offset_));
    chunk_begin_ = offset_;
    file_.read(offset_, std::as_writable_bytes(std::span(chunk_)));
}

std::optional<std::string_view> LineReader::next() {
    if (offset_ >= file_.size()) return std::nullopt;
    const auto rest = [this] { return std::string_view(chunk_).substr(offset_ - chunk_begin_); };
    std::size_t end = rest().find('\n');
    if (end == std::string_view::npos && chunk_begin_ + chunk_.size() < file_.size()) {
        read_chunk();
        end = rest().find('\n');
    }
    ++number_;
    whole_ = end != std::string_view::npos;
    if (!whole_ && chunk_begin_ + chunk_.size() < file_.size()) {
        if (long_lines_ == LongLines::pass_over) return pass_over();
        throw Error(ErrorKind::bad_data,
                    str_cat(file_.path().string(), " line ", number_, " is longer than ", longest, " bytes"));
    }
    const std::string_view line = rest().substr(0, end);
    offset_ += line.size() + (whole_ ? 1 : 0);
    return line;
}

std::string_view LineReader::pass_over() {
    while (!whole_ && chunk_begin_ + chunk_.size() < file_.size()) {
        offset_ = chunk_begin_ + chunk_.size();
        read_chunk();
        whole_ = chunk_.find('\n') != std::string::npos;
    }
    offset_ = chunk_begin_ + (whole_ ? chunk_.find('\n') + 1 : chunk_.size());
    return {};
}

}  // namespace microbatch
