#include "microbatch/data/token_file.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"
#include "microbatch/data/file_format.h"
#include "microbatch/io/input_file.h"

namespace microbatch {
namespace {

static_assert(std::endian::native == std::endian::little, "the header is read as it is and is little-endian");

constexpr std::int32_t uint16_magic = 20240520;
constexpr std::int32_t uint32_magic = 20240801;
constexpr std::int32_t known_version = 1;
constexpr std::uint64_t header_bytes = 256 * sizeof(std::int32_t);

[[noreturn]] void refuse(const InputFile& file, const std::string& reason) {
    throw Error(ErrorKind::bad_data, str_cat(file.path().string(), " ", reason));
}

/// The first words of an llm.c header; 0 if the file is too short.
std::array<std::int32_t, 3> read_header(const InputFile& file) {
    std::array<std::int32_t, 3> words{};
    const auto bytes = std::as_writable_bytes(std::span(words));
    file.read(0, bytes.first(static_cast<std::size_t>(std::min<std::uint64_t>(bytes.size(), file.size()))));
    return words;
}

/// Checks that a file without a header is neither a known format nor text.
void check_bare(const InputFile& file) {
    constexpr std::uint64_t enough = 4096;  // so many tokens without a zero byte are unlikely
    const FileFormat format = format_of(file);
    if (format.kind == FileFormat::known) {
        refuse(file, str_cat("is ", format.name, ", not a file of uint16 tokens: write only the tokens"));
    }
    if (format.kind == FileFormat::text && file.size() >= enough) {
        refuse(file,
               "looks like text, not like uint16 tokens (no byte is 0): give text a name that does not end in .bin, "
               "or write two bytes per token");
    }
}

/// Checks that the llm.c header describes the file.
void check_header(std::span<const std::int32_t, 3> header, const InputFile& file) {
    if (file.size() < header_bytes) {
        refuse(file, str_cat("is truncated: it has ", file.size(), " bytes of the ", header_bytes,
                             " of an llm.c header; write or download it again"));
    }
    const std::int32_t version = header[1], count = header[2];
    if (version != known_version) {
        refuse(file, str_cat("is an llm.c token file of version ", version, ", but only version ", known_version,
                             " (uint16 tokens) can be read"));
    }
    const auto following = static_cast<std::int64_t>(file.size() - header_bytes);
    if (following != std::int64_t{count} * 2) {
        refuse(file, str_cat("is truncated or corrupted: its header claims ", count, " tokens of 2 bytes, but ",
                             following, " bytes follow it; write or download it again"));
    }
}

}  // namespace

Tokens open_token_file(const std::filesystem::path& path) {
    const auto file = std::make_shared<const InputFile>(path);
    if (file->size() == 0) refuse(*file, "is empty: give a file of uint16 tokens");
    const auto header = read_header(*file);
    if (header[0] == uint32_magic) {
        refuse(*file, str_cat("holds uint32 tokens (llm.c's ", uint32_magic,
                              ", the Llama 3 tokenizer), but only uint16 tokens can be read: use another tokenizer"));
    }
    const bool has_header = header[0] == uint16_magic;
    has_header ? check_header(header, *file) : check_bare(*file);
    const std::uint64_t begin = has_header ? header_bytes : 0;
    const std::uint64_t bytes = file->size() - begin;
    if (bytes % 2 != 0) {
        refuse(*file, str_cat("is not a file of uint16 tokens, or is truncated: ", bytes, " bytes is an odd number"));
    }
    return {TokensInFile{file.get(), begin, static_cast<std::size_t>(bytes / 2)}, file};
}

}  // namespace microbatch
