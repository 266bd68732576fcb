#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <optional>
#include <string>
#include <string_view>

namespace microbatch {

/// The lines of a file, one after the other, in bounded memory whatever the file contains.
class LineReader {
public:
    /// No line may be longer than this.
    static constexpr std::uint64_t longest = std::uint64_t{1} << 20U;

    enum class LongLines { refuse, pass_over };

    /// Errors: as InputFile.
    explicit LineReader(const std::filesystem::path& path, LongLines long_lines = LongLines::refuse);

    /// The next line without its line break, valid until the next call; empty at the end of the file. The last line may
    /// lack a line break: see is_whole().
    /// Errors: ErrorKind::bad_data, naming file and line, if a line is too long and is not to be read as an empty one;
    ///         ErrorKind::bad_data, naming the file and the system's reason, if it cannot be read.
    std::optional<std::string_view> next();

    /// True if the line that next() returned ends with a line break.
    bool is_whole() const { return whole_; }

    /// The offset of the next line in bytes.
    std::uint64_t offset() const { return offset_; }

    /// The number of the line that next() returned, from 1.
    std::int64_t number() const { return number_; }

private:
    [[noreturn]] void refuse() const;

    std::filesystem::path path_;
    std::ifstream in_;
    LongLines long_lines_;
    std::string line_;
    std::uint64_t offset_ = 0;
    std::int64_t number_ = 0;
    bool whole_ = false;
};

}  // namespace microbatch
