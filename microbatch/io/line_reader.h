#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "microbatch/io/input_file.h"

namespace microbatch {

/// The lines of a file, one after the other, in bounded memory whatever the file contains.
class LineReader {
public:
    /// No line may be longer than this.
    static constexpr std::uint64_t longest = std::uint64_t{1} << 20U;

    enum class LongLines { refuse, pass_over };

    explicit LineReader(const std::filesystem::path& path, LongLines long_lines = LongLines::refuse)
        : file_(path), long_lines_(long_lines) {}

    /// The next line without its line break, valid until the next call; empty at the end of the file. The last line may
    /// lack a line break: see is_whole().
    /// Errors: ErrorKind::bad_data, naming file and line, if a line is too long and is not to be read as an empty one;
    ///         as InputFile::read().
    std::optional<std::string_view> next();

    /// True if the line that next() returned ends with a line break.
    bool is_whole() const { return whole_; }

    /// The offset of the next line in bytes.
    std::uint64_t offset() const { return offset_; }

    /// The number of the line that next() returned, from 1.
    std::int64_t number() const { return number_; }

private:
    void read_chunk();
    std::string_view pass_over();

    InputFile file_;
    LongLines long_lines_;
    std::string chunk_;  // of the file, from chunk_begin_
    std::uint64_t chunk_begin_ = 0;
    std::uint64_t offset_ = 0;
    std::int64_t number_ = 0;
    bool whole_ = false;
};

}  // namespace microbatch
