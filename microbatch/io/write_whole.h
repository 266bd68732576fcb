#pragma once

#include <filesystem>
#include <string_view>

namespace microbatch {

/// Writes a file, whole or not at all: under another name beside it first, then renamed.
/// Errors: ErrorKind::usage if it cannot be written, naming it and why; what was there before stays then.
void write_whole(const std::filesystem::path& file, std::string_view content);

}  // namespace microbatch
