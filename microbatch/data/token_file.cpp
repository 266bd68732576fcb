#include "microbatch/data/token_file.h"

#include <array>
#include <bit>
#include <cstddef>
#include <cstring>
#include <memory>
#include <string>

#include "microbatch/core/error.h"
#include "microbatch/core/text.h"
#include "microbatch/data/mapped_file.h"

namespace microbatch {
namespace {

static_assert(std::endian::native == std::endian::little, "token files are read in place and are little-endian");

using Bytes = std::span<const std::byte>;

constexpr std::int32_t uint16_magic = 20240520;
constexpr std::int32_t uint32_magic = 20240801;
constexpr std::int32_t known_version = 1;
constexpr std::size_t header_bytes = 256 * sizeof(std::int32_t);

[[noreturn]] void refuse(const std::filesystem::path& path, const std::string& reason) {
    throw Error(ErrorKind::bad_data, text(path.string(), " ", reason));
}

std::int32_t magic_of(Bytes file) {
    std::int32_t magic = 0;
    if (file.size() >= sizeof magic) std::memcpy(&magic, file.data(), sizeof magic);
    return magic;
}

/// What follows the header of llm.c, once the header is found to describe it.
Bytes after_header(Bytes file, const std::filesystem::path& path) {
    if (file.size() < header_bytes) {
        refuse(path, text("is truncated: it has ", file.size(), " bytes of the ", header_bytes,
                          " of an llm.c header; write or fetch it again"));
    }
    std::array<std::int32_t, 3> header{};
    std::memcpy(header.data(), file.data(), sizeof header);
    const auto [magic, version, count] = header;
    if (version != known_version) {
        refuse(path, text("is an llm.c token file of version ", version, ", but only version ", known_version,
                          " (uint16 tokens) can be read"));
    }
    const Bytes tokens = file.subspan(header_bytes);
    if (static_cast<std::int64_t>(tokens.size()) != std::int64_t{count} * 2) {
        refuse(path, text("is truncated or damaged: its header announces ", count, " tokens of 2 bytes, but ",
                          tokens.size(), " bytes follow it; write or fetch it again"));
    }
    return tokens;
}

}  // namespace

Tokens open_token_file(const std::filesystem::path& path) {
    const auto file = std::make_shared<const MappedFile>(path);
    Bytes tokens = file->bytes();
    if (tokens.empty()) refuse(path, "is empty: give a file of uint16 tokens");
    const std::int32_t magic = magic_of(tokens);
    if (magic == uint32_magic) {
        refuse(path, text("holds uint32 tokens (llm.c's ", uint32_magic,
                          ", the Llama 3 tokenizer), but only uint16 tokens can be read: write it with another one"));
    }
    if (magic == uint16_magic) tokens = after_header(tokens, path);
    if (tokens.size() % 2 != 0) {
        refuse(path,
               text("is not a file of uint16 tokens, or is truncated: ", tokens.size(), " bytes is an odd number"));
    }
    const auto* first = reinterpret_cast<const std::uint16_t*>(tokens.data());
    return {std::span<const std::uint16_t>(first, tokens.size() / 2), file};
}

}  // namespace microbatch
