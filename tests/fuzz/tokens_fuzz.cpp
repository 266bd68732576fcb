// Files of tokens, as nanoGPT and llm.c write them.
#include <algorithm>
#include <cstring>
#include <string>

#include "fuzz/fuzz.h"
#include "microbatch/core/crc32c.h"
#include "microbatch/data/tokens.h"

namespace microbatch {
namespace {

using fuzz::require;

constexpr std::size_t header_bytes = 1024;

/// All the tokens as bytes, read in parts that do not divide them.
std::string bytes_of(const Tokens& tokens) {
    const auto& all = std::get<TokensInFile>(tokens.values);
    std::string bytes;
    TokenBuffer buffer;
    for (std::size_t begin = 0; begin < all.size(); begin += 7) {
        const auto part = std::as_bytes(tokens_at(all, begin, std::min<std::size_t>(7, all.size() - begin), buffer));
        bytes.append(reinterpret_cast<const char*>(part.data()), part.size());
    }
    return bytes;
}

/// What the header of llm.c is: 256 int32, of which three are used.
std::string with_header(const std::string& bytes) {
    const std::int32_t words[] = {20240520, 1, static_cast<std::int32_t>(bytes.size() / 2)};
    std::string content(header_bytes, '\0');
    std::memcpy(content.data(), words, sizeof words);
    return content + bytes;
}

void check(const Tokens& tokens, std::string_view input) {
    const std::string bytes = bytes_of(tokens);
    require(bytes == input || bytes == input.substr(std::min(header_bytes, input.size())),
            "the tokens are the file, or what follows its header");
    const TokenScan seen = scan(tokens);
    require(0 <= seen.vocabulary && seen.vocabulary <= 65536, "a token has 16 bits");
    require(seen.checksum == crc32c(bytes), "the checksum is that of the bytes");
    const std::int64_t middle = tokens.size() / 3;
    require(bytes_of(tokens.slice(0, middle)) + bytes_of(tokens.slice(middle, tokens.size())) == bytes,
            "the parts are the whole");
    require(bytes_of(open_token_file(fuzz::folder().write("again", with_header(bytes)))) == bytes,
            "what is written reads back");
}

}  // namespace
}  // namespace microbatch

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    using namespace microbatch;
    const std::string_view input = fuzz::characters(data, size);
    const auto path = fuzz::folder().write("input", input);
    const auto tokens = fuzz::accepted(ErrorKind::bad_data, [&] { return open_token_file(path); });
    if (!tokens) return 0;
    check(*tokens, input);
    // A file that becomes shorter while it is open.
    std::filesystem::resize_file(path, size / 2);
    const auto seen = fuzz::accepted(ErrorKind::bad_data, [&] { return scan(*tokens); });
    require(!seen || tokens->size() == 0, "what is gone cannot be read");
    return 0;
}
