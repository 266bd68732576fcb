#include "microbatch/data/file_format.h"

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace microbatch {
namespace {

using namespace std::string_view_literals;

constexpr std::size_t checked_bytes = 8192;

struct Signature {
    std::string_view bytes;
    const char* name;
};

constexpr std::array signatures{
    Signature{"\x1f\x8b\x08"sv, "gzip-compressed"},
    Signature{"\x28\xb5\x2f\xfd"sv, "Zstandard-compressed"},
    Signature{"\xfd\x37zXZ\0"sv, "xz-compressed"},
    Signature{"BZh91AY&SY"sv, "bzip2-compressed"},
    Signature{"PK\x03\x04"sv, "a zip archive (such as from torch.save or numpy.savez)"},
    Signature{"\x93NUMPY"sv, "a NumPy array (.npy)"},
    Signature{"PAR1"sv, "a Parquet table"},
    Signature{"ARROW1\0\0"sv, "an Arrow table"},
    Signature{"\x89HDF\r\n"sv, "an HDF5 file"},
    Signature{"%PDF-"sv, "a PDF document"},
};

/// True if every second character is NUL and the others are ASCII text.
bool has_nul_beside_ascii(std::string_view head) {
    if (head.size() < 2) return false;
    const std::size_t nul = head[0] == '\0' ? 0 : 1;  // big-endian or little-endian
    for (std::size_t i = 0; i < head.size(); ++i) {
        const auto byte = static_cast<unsigned char>(head[i]);
        const bool ascii = (byte >= ' ' && byte <= '~') || (byte >= '\t' && byte <= '\r');
        if (i % 2 == nul ? byte != 0 : !ascii) return false;
    }
    return true;
}

}  // namespace

FileFormat format_of(const InputFile& file) {
    std::array<char, checked_bytes> bytes{};
    const std::string_view head(bytes.data(),
                                static_cast<std::size_t>(std::min<std::uint64_t>(bytes.size(), file.size())));
    file.read(0, std::as_writable_bytes(std::span(bytes).first(head.size())));
    for (const Signature& signature : signatures) {
        if (head.starts_with(signature.bytes)) return {FileFormat::known, signature.name};
    }
    if (head.starts_with("\xff\xfe"sv) || head.starts_with("\xfe\xff"sv) || has_nul_beside_ascii(head)) {
        return {FileFormat::utf16, "UTF-16 text"};
    }
    const bool nul = head.find('\0') != std::string_view::npos;
    return nul ? FileFormat{FileFormat::binary, "binary"} : FileFormat{};
}

}  // namespace microbatch
