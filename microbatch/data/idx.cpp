#include "microbatch/data/idx.h"

#include <zlib.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <iomanip>
#include <memory>
#include <span>
#include <sstream>
#include <string>

#include "microbatch/core/error.h"
#include "microbatch/core/units.h"
#include "microbatch/io/input_file.h"

namespace microbatch {
namespace {

constexpr std::uint8_t unsigned_byte = 0x08;
constexpr std::size_t chunk_bytes = 1 << 20;
// The largest expansion of one byte by deflate: https://zlib.net/zlib_tech.html
constexpr std::uint64_t largest_expansion = 1032;

/// Bytes of a file in order, decompressed on the way if it is gzipped.
class Reader {
public:
    explicit Reader(const std::filesystem::path& path) : path_(path) {
        // zlib opens folders and pipes and gives few reasons for errors, so InputFile checks first.
        size_ = InputFile(path).size();
        if (size_ == 0) refuse("is empty: give an IDX file");
        file_.reset(::gzopen(path.c_str(), "rbe"));
        if (!file_) refuse("cannot be opened");
        ::gzbuffer(file_.get(), 1 << 17);
    }

    template <class... Parts>
    [[noreturn]] void refuse(const Parts&... reason) const {
        throw Error(ErrorKind::bad_data, path_.string(), " ", reason...);
    }

    /// An upper bound of the content, gzipped or not.
    std::uint64_t bound() const { return (size_ + 1) * largest_expansion; }

    /// Reads as many bytes as are left, up to the length of `into`.
    std::size_t read(std::span<std::uint8_t> into) {
        const int count = ::gzread(file_.get(), into.data(), static_cast<unsigned>(into.size()));
        int state = Z_OK;
        const char* reason = ::gzerror(file_.get(), &state);
        // A stream that is truncated before its checksum returns its data and sets only the state.
        if (count < 0 || state == Z_BUF_ERROR) refuse("is corrupted: ", reason, "; download it again");
        return static_cast<std::size_t>(count);
    }

private:
    struct Close {
        void operator()(gzFile_s* file) const { ::gzclose(file); }
    };
    const std::filesystem::path& path_;
    std::uint64_t size_ = 0;
    std::unique_ptr<gzFile_s, Close> file_;
};

std::string hex(std::span<const std::uint8_t> bytes) {
    std::ostringstream out;
    out << "0x" << std::hex << std::setfill('0');
    for (const std::uint8_t byte : bytes) out << std::setw(2) << int{byte};
    return out.str();
}

void check_magic(const Reader& file, std::span<const std::uint8_t> magic, int dimensions) {
    const std::array<std::uint8_t, 4> expected{0, 0, unsigned_byte, static_cast<std::uint8_t>(dimensions)};
    if (magic[0] != 0 || magic[1] != 0) {
        file.refuse("is not an IDX file: its magic number is ", hex(magic), ", expected ", hex(expected));
    }
    if (magic[2] != unsigned_byte) {
        file.refuse("has elements of type ", hex(magic.subspan(2, 1)), ", expected ",
                    hex(std::span(expected).subspan(2, 1)), " (unsigned bytes)");
    }
    if (magic[3] != dimensions) {
        file.refuse("has ", int{magic[3]}, " dimensions, expected ", dimensions, dimensions == 3 ? " (images)" : "",
                    dimensions == 1 ? " (labels)" : "");
    }
}

std::vector<std::int64_t> read_shape(Reader& file, int dimensions, std::uint64_t most_bytes) {
    std::array<std::uint8_t, 4> word{};
    if (const std::size_t count = file.read(word); count < word.size()) {
        file.refuse("is truncated: ", count, " bytes, expected an IDX header of ", 4 + 4 * dimensions);
    }
    check_magic(file, word, dimensions);
    std::vector<std::int64_t> shape;
    std::uint64_t elements = 1;
    for (int i = 0; i < dimensions; ++i) {
        if (file.read(word) < word.size()) {
            file.refuse("is truncated within its header, expected ", 4 + 4 * dimensions, " bytes of header");
        }
        shape.push_back(std::int64_t{word[0]} << 24 | word[1] << 16 | word[2] << 8 | word[3]);
        if (shape.back() == 0) file.refuse("is empty: dimension ", i, " is 0, expected at least 1");
        const auto length = static_cast<std::uint64_t>(shape.back());
        if (length > most_bytes / elements) {
            file.refuse("has a header that claims more than ", format_bytes(static_cast<std::int64_t>(most_bytes)),
                        " (dimension ", i, " is ", length, "), its limit in memory: use a smaller data set");
        }
        elements *= length;
    }
    return shape;
}

std::vector<std::uint8_t> read_elements(Reader& file, std::size_t announced) {
    std::vector<std::uint8_t> bytes;
    bytes.reserve(static_cast<std::size_t>(std::min<std::uint64_t>(announced, file.bound())));
    while (bytes.size() < announced) {
        const std::size_t before = bytes.size();
        const std::size_t wanted = std::min(chunk_bytes, announced - before);
        bytes.resize(before + wanted);
        const std::size_t count = file.read(std::span(bytes).subspan(before));
        if (count < wanted) {
            file.refuse("is truncated: it has ", before + count, " bytes after its header, expected ", announced);
        }
    }
    if (std::array<std::uint8_t, 1> next{}; file.read(next) != 0) {
        file.refuse("has extra bytes at the end: its header claims ", announced, " bytes");
    }
    return bytes;
}

}  // namespace

IdxArray read_idx(const std::filesystem::path& path, int dimensions, std::uint64_t most_bytes) {
    if (dimensions < 1 || dimensions > 255) {
        throw Error(ErrorKind::usage, "an IDX file has 1 to 255 dimensions, not ", dimensions);
    }
    Reader file(path);
    IdxArray array;
    array.shape = read_shape(file, dimensions, most_bytes);
    std::size_t elements = 1;
    for (const std::int64_t length : array.shape) elements *= static_cast<std::size_t>(length);
    array.bytes = read_elements(file, elements);
    return array;
}

}  // namespace microbatch
