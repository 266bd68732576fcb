#pragma once

#include <cstdint>
#include <string_view>

namespace microbatch {

/// CRC-32C (Castagnoli) of the bytes, and of those before them if `before` is theirs.
/// Source: RFC 3720, appendix B.4; polynomial 0x1EDC6F41, reflected.
std::uint32_t crc32c(std::string_view bytes, std::uint32_t before = 0);

}  // namespace microbatch
