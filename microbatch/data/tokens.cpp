#include "microbatch/data/tokens.h"

#include <algorithm>
#include <bit>
#include <string_view>
#include <utility>

#include "microbatch/core/crc32c.h"
#include "microbatch/core/error.h"
#include "microbatch/data/file_format.h"

namespace microbatch {
namespace {

static_assert(std::endian::native == std::endian::little, "token files are read as they are and are little-endian");

constexpr std::size_t scanned_tokens = std::size_t{1} << 19;

template <class Value>
void add_to(TokenScan& found, std::span<const Value> tokens) {
    std::uint8_t* here = found.seen[static_cast<std::size_t>(found.count % 2)].data();
    std::uint8_t* next = found.seen[static_cast<std::size_t>((found.count + 1) % 2)].data();
    for (std::size_t i = 0; i + 1 < tokens.size(); i += 2) {
        here[tokens[i]] = 1;
        next[tokens[i + 1]] = 1;
    }
    if (tokens.size() % 2 == 1) here[tokens.back()] = 1;
    found.count += static_cast<std::int64_t>(tokens.size());
    const std::string_view bytes(reinterpret_cast<const char*>(tokens.data()), tokens.size_bytes());
    found.checksum = crc32c(bytes, found.checksum);
}

constexpr std::int32_t uint16_magic = 20240520;
constexpr std::int32_t uint32_magic = 20240801;
constexpr std::int32_t known_version = 1;
constexpr std::uint64_t header_bytes = 256 * sizeof(std::int32_t);

template <class... Parts>
[[noreturn]] void refuse(const InputFile& file, const Parts&... reason) {
    throw Error(ErrorKind::bad_data, file.path().string(), " ", reason...);
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
        refuse(file, "is ", format.name, ", not a file of uint16 tokens: write only the tokens");
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
        refuse(file, "is truncated: it has ", file.size(), " bytes of the ", header_bytes,
               " of an llm.c header; write or download it again");
    }
    const std::int32_t version = header[1], count = header[2];
    if (version != known_version) {
        refuse(file, "is an llm.c token file of version ", version, ", but only version ", known_version,
               " (uint16 tokens) can be read");
    }
    const auto following = static_cast<std::int64_t>(file.size() - header_bytes);
    if (following != std::int64_t{count} * 2) {
        refuse(file, "is truncated or corrupted: its header claims ", count, " tokens of 2 bytes, but ", following,
               " bytes follow it; write or download it again");
    }
}

}  // namespace

std::int64_t Tokens::size() const {
    return std::visit([](const auto& all) { return static_cast<std::int64_t>(all.size()); }, values);
}

Tokens Tokens::slice(std::int64_t begin, std::int64_t end) const {
    if (begin < 0 || begin > end || end > size()) {
        throw Error(ErrorKind::usage, "tokens [", begin, ", ", end, ") are outside the ", size(), " tokens");
    }
    const auto part = [&](const auto& all) -> decltype(values) {
        return all.subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(end - begin));
    };
    return {std::visit(part, values), owner};
}

Tokens byte_tokens(std::vector<std::uint8_t> bytes) {
    const auto owner = std::make_shared<const std::vector<std::uint8_t>>(std::move(bytes));
    return {std::span<const std::uint8_t>(*owner), owner};
}

Tokens open_token_file(const std::filesystem::path& path) {
    const auto file = std::make_shared<const InputFile>(path);
    if (file->size() == 0) refuse(*file, "is empty: give a file of uint16 tokens");
    const auto header = read_header(*file);
    if (header[0] == uint32_magic) {
        refuse(*file, "holds uint32 tokens (llm.c's ", uint32_magic,
               ", the Llama 3 tokenizer), but only uint16 tokens can be read: use another tokenizer");
    }
    const bool has_header = header[0] == uint16_magic;
    has_header ? check_header(header, *file) : check_bare(*file);
    const std::uint64_t begin = has_header ? header_bytes : 0;
    const std::uint64_t bytes = file->size() - begin;
    if (bytes % 2 != 0) {
        refuse(*file, "is not a file of uint16 tokens, or is truncated: ", bytes, " bytes is an odd number");
    }
    return {TokensInFile{file.get(), begin, static_cast<std::size_t>(bytes / 2)}, file};
}

TokenScan scan(const Tokens& tokens, TokenScan found) {
    TokenBuffer buffer;
    const auto look_at = [&](const auto& all) {
        for (std::size_t begin = 0; begin < all.size(); begin += scanned_tokens) {
            add_to(found, tokens_at(all, begin, std::min(scanned_tokens, all.size() - begin), buffer));
        }
    };
    std::visit(look_at, tokens.values);
    for (std::size_t token = 0; token < TokenScan::values; ++token) {
        if (found.seen[0][token] + found.seen[1][token] > 0) found.vocabulary = static_cast<std::int64_t>(token) + 1;
    }
    return found;
}

std::span<const std::uint16_t> tokens_at(const TokensInFile& all, std::size_t begin, std::size_t count,
                                         TokenBuffer& buffer) {
    buffer.resize(count);
    all.file->read(all.subspan(begin, count).offset, std::as_writable_bytes(std::span(buffer)));
    return buffer;
}

}  // namespace microbatch
