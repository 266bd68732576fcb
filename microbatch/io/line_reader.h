#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <optional>
#include <string>
#include <string_view>

namespace microbatch {

/// The lines of a file, one after the other, in little memory whatever the file holds.
class LineReader {
public:
    /// No line may be longer than this.
    static constexpr std::uint64_t longest = std::uint64_t{1} << 20U;

    enum class LongLines { refuse, pass_over };

    /// Errors: as InputFile's.
    explicit LineReader(const std::filesystem::path& path, LongLines long_lines = LongLines::refuse);

    /// The next line, without its end, until the next call; none at the end of the file. The last one may have no end:
    /// see is_whole().
    /// Errors: ErrorKind::bad_data, naming file and line, if it is too long, where it is not to be passed over as an
    ///         empty one; or it cannot be read.
    std::optional<std::string_view> next();

    /// Whether the line that next() gave has an end.
    bool is_whole() const { return whole_; }

    /// Where the line after it begins, in bytes.
    std::uint64_t offset() const { return offset_; }

    /// The number of the line that next() gave, from 1.
    std::int64_t number() const { return number_; }

private:
    std::filesystem::path path_;
    std::ifstream in_;
    LongLines long_lines_;
    std::string line_;
    std::uint64_t offset_ = 0;
    std::int64_t number_ = 0;
    bool whole_ = false;
};

}  // namespace microbatch
